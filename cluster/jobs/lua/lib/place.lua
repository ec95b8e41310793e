-- The load balancer. Needs names.lua, queue.lua and close.lua.

-- Replicas whose lease runs, with the slots they have taken.
local function live_replicas(now_ms)
  local rows = {}
  for _, replica in ipairs(redis.call('ZRANGEBYSCORE', REPLICAS, '(' .. now_ms, '+inf')) do
    local row = redis.call('HMGET', replica_key(replica), 'slots', 'address', 'last_assigned_seq')
    if row[1] then
      rows[#rows + 1] = {
        replica = replica, slots = tonumber(row[1]), address = row[2], turn = tonumber(row[3] or 0),
        active = redis.call('HLEN', running_key(replica)),
      }
    end
  end
  return rows
end

-- Fewest active canvases first, then the one whose last assignment is longest ago, then the name.
local function goes_before(a, b)
  if a.active ~= b.active then return a.active < b.active end
  if a.turn ~= b.turn then return a.turn < b.turn end
  return a.replica < b.replica
end

local function pick_replica(rows)
  local best = nil
  for _, row in ipairs(rows) do
    if row.active < row.slots and (best == nil or goes_before(row, best)) then best = row end
  end
  return best
end

local function expire_waiting(member, now_ms, retention_s)
  local job_id = member_job_id(member)
  local router = redis.call('HGET', job_key(job_id), 'router')
  close_job(job_id, 'failed', {
    'failure_code', 4, 'failure_reason', 'DEADLINE_EXCEEDED',
    'failure_message', 'the deadline passed while the job waited for a slot',
  }, now_ms, retention_s)
  ring(router, 'failed', job_id)
end

-- The epoch rises with every assignment: writes under an older one are refused from here on.
local function start_job(member, row, now_ms)
  local job_id = member_job_id(member)
  local key = job_key(job_id)
  local job = redis.call('HMGET', key, 'epoch', 'attempts', 'router', 'started_ms')
  local epoch = tonumber(job[1]) + 1
  local started_ms = job[4]
  if started_ms == '' then started_ms = now_ms end
  redis.call('ZREM', QUEUE, member)
  redis.call('HSET', key, 'state', 'running', 'epoch', epoch, 'attempts', tonumber(job[2]) + 1,
    'replica', row.replica, 'address', row.address, 'started_ms', started_ms)
  redis.call('HSET', running_key(row.replica), job_id, epoch)
  row.turn = redis.call('INCR', SEQ)
  row.active = row.active + 1
  redis.call('HSET', replica_key(row.replica), 'last_assigned_seq', row.turn)
  ring(job[3], 'assigned', job_id)
end

-- Gives free slots to the head of the queue; looks at no more than `limit` waiting jobs, so that one script never
-- holds Redis for long. A head whose deadline has passed leaves the queue. Returns how many jobs were placed.
local function place(limit, now_ms, retention_s)
  local rows, placed = nil, 0
  for _ = 1, limit do
    local member = first_member(nil)
    if not member then break end
    if member_deadline_ms(member) <= now_ms then
      expire_waiting(member, now_ms, retention_s)
    else
      rows = rows or live_replicas(now_ms)
      local row = pick_replica(rows)
      if not row then break end
      start_job(member, row, now_ms)
      placed = placed + 1
    end
  end
  return placed
end
