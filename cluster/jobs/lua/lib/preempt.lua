-- Who gives way to whom; the policy is that of cluster/policy/preemption.py. Needs names.lua, queue.lua and
-- apart.lua.
-- VICTIMS holds <priority>:<2^53 - 1 - turn, 16 digits>:<job id> of each running job that may be preempted: the
-- first one is of the lowest priority, and of those the youngest.

local function victim_member(priority, turn, job_id)
  return string.format('%d:%016d:', priority, NO_DEADLINE_MS - turn) .. job_id
end

local function takes_jobs(replica, now_ms)
  local lease_end_ms = tonumber(redis.call('ZSCORE', REPLICAS, replica) or 0)
  local row = redis.call('HMGET', replica_key(replica), 'suspect', 'draining')
  return lease_end_ms > now_ms and not row[1] and not row[2]
end

-- Whether the slot of a victim of `priority` on `replica` is worth it: of the jobs that no mark serves yet, the first
-- few hold one that is more urgent by its own priority (not by what it gained by waiting) and can use it. One on its
-- last chance asks only while no other runs apart: it might have to wait for that one all the same.
local function is_wanted(priority, replica, marks, apart)
  for _, member in ipairs(redis.call('ZRANGEBYLEX', QUEUE, '-', '+', 'LIMIT', marks, 8)) do
    local job = redis.call('HMGET', job_key(member_job_id(member)), 'priority', 'losses')
    if tonumber(job[1]) > priority then
      if not is_last_chance(tonumber(job[2])) then return true end
      if next(apart) == nil and redis.call('SCARD', fresh_key(replica)) == 0 then return true end
    end
  end
  return false
end

-- A mark is a slot on its way: as many of the jobs in front of the queue are served by the marks that are out. The
-- slot of a replica that takes no jobs now would help nobody: its jobs are passed over.
local function mark_victims(now_ms)
  if redis.call('ZCARD', QUEUE) <= redis.call('SCARD', MARKED) then return end
  local marked, passed, apart = 0, 0, replicas_apart()
  while marked < 8 and passed < 64 do
    local victim = redis.call('ZRANGEBYLEX', VICTIMS, '-', '+', 'LIMIT', passed, 1)[1]
    if not victim then return end
    local job_id = string.sub(victim, 20)
    local job = redis.call('HMGET', job_key(job_id), 'replica', 'epoch')
    if apart[job[1]] or not takes_jobs(job[1], now_ms) then
      passed = passed + 1
    elseif is_wanted(tonumber(string.sub(victim, 1, 1)), job[1], redis.call('SCARD', MARKED), apart) then
      redis.call('ZREM', VICTIMS, victim)
      redis.call('SADD', MARKED, job_id)
      redis.call('HSET', running_key(job[1]), job_id, job[2] .. ' preempt')
      ring(job[1], 'preempt:' .. job[2], job_id)
      marked = marked + 1
    else
      return
    end
  end
end
