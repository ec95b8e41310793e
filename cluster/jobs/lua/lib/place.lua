-- The load balancer. Needs names.lua, policy.lua, quota.lua, queue.lua, slot.lua, close.lua, apart.lua and preempt.lua.

-- Replicas that take jobs, with the slots they have taken: the lease runs, nobody found them unreachable since
-- their last heartbeat, and they do not drain. `kept`: for a job on its last chance alone.
local function live_replicas(now_ms)
  local rows, apart = {}, replicas_apart()
  for _, replica in ipairs(redis.call('ZRANGEBYSCORE', REPLICAS, '(' .. now_ms, '+inf')) do
    local row = redis.call('HMGET', replica_key(replica), 'slots', 'address', 'last_assigned_seq', 'suspect',
      'draining')
    if row[1] and not row[4] and not row[5] then
      rows[#rows + 1] = {
        replica = replica, slots = tonumber(row[1]), address = row[2], turn = tonumber(row[3] or 0),
        active = redis.call('HLEN', running_key(replica)), kept = apart[replica],
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
    local free = row.active < row.slots and not row.kept
    if free and (best == nil or goes_before(row, best)) then best = row end
  end
  return best
end

-- The replica for a job on its last chance. Where all have fresh jobs, the one with the fewest is kept for it: they
-- commit or end, and so it gets its turn within one canvas. No more than half of the replicas are kept at a time.
local function pick_apart(rows)
  local kept, best = 0, nil
  for _, row in ipairs(rows) do
    if row.kept then
      kept = kept + 1
    elseif row.active < row.slots then
      row.fresh = redis.call('SCARD', fresh_key(row.replica))
      local fewer = best == nil or row.fresh < best.fresh
      if fewer or (row.fresh == best.fresh and goes_before(row, best)) then best = row end
    end
  end
  if best == nil or kept >= math.max(1, math.floor(#rows / 2)) then return nil end
  best.kept = true
  if best.fresh == 0 then return best end
  return nil
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
  dequeue(job_id, member, job.counted)
  if job.counted then quotas().runs(job.counted, job_id) end
  redis.call('HSET', key, 'state', 'running', 'epoch', epoch, 'attempts', tonumber(job.attempts) + 1,
    'replica', row.replica, 'address', row.address, 'victim', victim, 'assigned_ms', now_ms)
  if job.started_ms == '' then redis.call('HSET', key, 'started_ms', now_ms) end
  redis.call('HSET', running_key(row.replica), job_id, epoch)
  redis.call('HSET', replica_key(row.replica), 'last_assigned_seq', row.turn)
  if tonumber(job.preemptions) < MAX_PREEMPTIONS then redis.call('ZADD', VICTIMS, 0, victim) end
  redis.call('SADD', fresh_key(row.replica), job_id)
  if job.last_chance then redis.call('HSET', APART, job_id, row.replica) end
  ring(job.router, 'assigned', job_id)
end

local function waiting_job(job_id)
  local row = redis.call('HMGET', job_key(job_id), 'epoch', 'attempts', 'router', 'started_ms', 'priority',
    'preemptions', 'losses', 'counted', 'tenant')
  return {epoch = row[1], attempts = row[2], router = row[3], started_ms = row[4], priority = row[5],
    preemptions = row[6], last_chance = is_last_chance(tonumber(row[7])), counted = row[8] and row[9]}
end

-- Gives free slots to the head of the queue. It handles no more than PLACED waiting jobs, or `limit` where that is
-- more, and passes over no more than PASSED, so that no script holds Redis for long. A head whose deadline has passed
-- leaves the queue; one on its last chance is passed over until it can run apart. When slots are short, more urgent
-- jobs mark victims. Returns how many jobs were placed.
local PLACED, PASSED = 128, 64
local function place(now_ms, limit)
  local rows, placed, passed = nil, 0, 0
  limit = math.max(limit or 0, PLACED)
  while limit > 0 and passed < PASSED do
    local member = redis.call('ZRANGEBYLEX', QUEUE, '-', '+', 'LIMIT', passed, 1)[1]
    if not member then break end
    if member_deadline_ms(member) <= now_ms then
      expire_waiting(member, now_ms)
      limit = limit - 1
    else
      rows = rows or live_replicas(now_ms)
      local job_id = member_job_id(member)
      local job, row = waiting_job(job_id), nil
      if job.last_chance then row = pick_apart(rows) else row = pick_replica(rows) end
      if row then
        start_job(member, job_id, job, row, now_ms)
        placed, limit = placed + 1, limit - 1
      elseif job.last_chance then
        passed = passed + 1
      else
        break
      end
    end
  end
  mark_victims(now_ms)
  return placed
end
