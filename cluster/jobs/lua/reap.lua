-- reap: the owner router lost the replica in the middle of a run. The job goes back to the queue at once, and the
-- replica gets no more jobs until its next heartbeat says that it lives (lib/suspicion.lua).
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record.
-- ARGV   1 limits (lib/policy.lua), 2 job id, 3 epoch, 4 reason, 5 message, 6 '1' when it counts as a loss.
-- From   RUNNING under this epoch.
-- Return 1.
-- Errors JOB_NOT_FOUND, STALE_EPOCH, ILLEGAL_TRANSITION.
--@include names.lua
--@include policy.lua
--@include clock.lua
--@include fence.lua
--@include quota.lua
--@include queue.lua
--@include slot.lua
--@include close.lua
--@include apart.lua
--@include preempt.lua
--@include place.lua
--@include requeue.lua
--@include suspicion.lua

local job = redis.call('HMGET', KEYS[13], 'state', 'epoch', 'replica')
local refused = not_running(job[1], job[2], ARGV[3])
if refused then return refused end

local now_ms = clock_ms()
suspect(job[3], now_ms)
requeue(ARGV[2], ARGV[4], ARGV[5], ARGV[6], now_ms)
ring(job[3], 'released:' .. job[2], ARGV[2])
place(now_ms)
return 1
