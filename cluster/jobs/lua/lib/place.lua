-- The load balancer. Needs names.lua, policy.lua, queue.lua, slot.lua, close.lua, doubt.lua and preempt.lua.

-- Replicas that take jobs, with the slots they have taken: the lease runs, nobody found them unreachable since
-- their last heartbeat, and they do not drain.
local function live_replicas(now_ms)
  local rows = {}
  for _, replica in ipairs(redis.call('ZRANGEBYSCORE', REPLICAS, '(' .. now_ms, '+inf')) do
    local row = redis.call('HMGET', replica_key(replica), 'slots', 'address', 'last_assigned_seq', 'suspect', 'draining')
    if row[1] and not row[4] and not row[5] then
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

-- The best of the replicas with a free slot; `doubts` (lib/doubt.lua) says where a job in doubt may run.
local function pick_replica(rows, doubts, losses)
  local best = nil
  for _, row in ipairs(rows) do
    local free = row.active < row.slots and (losses == 0 or may_run(doubts, losses, row.replica))
    if free and (best == nil or goes_before(row, best)) then best = row end
  end
  return best
end

local function expire_waiting(member, now_ms)
  local job_id = member_job_id(member)
  local router = redis.call('HGET', job_key(job_id), 'router')
  close_job(job_id, 'failed', {
    'failure_code', 4, 'failure_reason', 'DEADLINE_EXCEEDED',
    'failure_message', 'the deadline passed while the job waited for a slot',
  }, now_ms)
  ring(router, 'failed', job_id)
end

-- The epoch rises with every assignment: writes under an older one are refused from here on.
local function start_job(member, job_id, job, row, now_ms)
  local key = job_key(job_id)
  local epoch = tonumber(job.epoch) + 1
  row.turn = redis.call('INCR', SEQ)
  row.active = row.active + 1
  local victim = victim_member(tonumber(job.priority), row.turn, job_id)
  dequeue(job_id, member)
  redis.call('HSET', key, 'state', 'running', 'epoch', epoch, 'attempts', tonumber(job.attempts) + 1,
    'replica', row.replica, 'address', row.address, 'victim', victim, 'assigned_ms', now_ms)
  if job.started_ms == '' then redis.call('HSET', key, 'started_ms', now_ms) end
  redis.call('HSET', running_key(row.replica), job_id, epoch)
  redis.call('HSET', replica_key(row.replica), 'last_assigned_seq', row.turn)
  if tonumber(job.preemptions) < MAX_PREEMPTIONS then redis.call('ZADD', VICTIMS, 0, victim) end
  if job.losses > 0 then redis.call('HSET', DOUBTED, job_id, job.losses .. ' ' .. row.replica) end
  ring(job.router, 'assigned', job_id)
end

local function waiting_job(job_id)
  local row = redis.call('HMGET', job_key(job_id), 'epoch', 'attempts', 'router', 'started_ms', 'priority',
    'preemptions', 'losses')
  return {epoch = row[1], attempts = row[2], router = row[3], started_ms = row[4], priority = row[5],
    preemptions = row[6], losses = tonumber(row[7])}
end

-- Gives free slots to the head of the queue; handles no more than `limit` waiting jobs and passes over no more than
-- PASSED, so that one script never holds Redis for long. A head whose deadline has passed leaves the queue; one in
-- doubt that may not run where slots are free is passed over. When slots are short, more urgent jobs mark victims.
-- Returns how many jobs were placed.
local PASSED = 64
local function place(limit, now_ms)
  local rows, doubts, placed, passed = nil, nil, 0, 0
  while limit > 0 and passed < PASSED do
    local member = redis.call('ZRANGEBYLEX', QUEUE, '-', '+', 'LIMIT', passed, 1)[1]
    if not member then return placed end
    if member_deadline_ms(member) <= now_ms then
      expire_waiting(member, now_ms)
      limit = limit - 1
    else
      rows = rows or live_replicas(now_ms)
      local job_id = member_job_id(member)
      local job = waiting_job(job_id)
      if job.losses > 0 and not doubts then doubts = running_doubts() end
      local row = pick_replica(rows, doubts, job.losses)
      if row then
        start_job(member, job_id, job, row, now_ms)
        if job.losses > 0 then add_doubt(doubts, row.replica, job.losses) end
        placed, limit = placed + 1, limit - 1
      elseif job.losses > 0 and pick_replica(rows, nil, 0) then
        passed = passed + 1
      else
        break
      end
    end
  end
  mark_victims(now_ms)
  return placed
end
