-- A running job's slot. Needs names.lua.

-- Takes a job off its slot. `victim` is its entry among those that may be preempted.
-- Invariant: a job is in running:<replica> of one replica exactly while its state is RUNNING; only then can it be
-- a victim, marked, fresh or apart.
local function leave_slot(job_id, replica, victim)
  redis.call('HDEL', running_key(replica), job_id)
  if victim then redis.call('ZREM', VICTIMS, victim) end
  redis.call('SREM', MARKED, job_id)
  redis.call('SREM', fresh_key(replica), job_id)
  redis.call('HDEL', APART, job_id)
end
