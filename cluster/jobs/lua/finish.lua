-- finish: the answer is whole. The freed slot goes to the head of the queue in the same step.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record.
-- ARGV   1 limits (lib/policy.lua), 2 job id, 3 epoch, 4 finish reason.
-- From   RUNNING under this epoch. Repeated word for word under the same epoch it changes nothing.
-- Return what the job took (lib/usage.lua).
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
--@include finish.lua
--@include usage.lua

local job = redis.call('HMGET', KEYS[13], 'state', 'epoch', 'finish_reason')
if not job[1] then return not_found() end
if job[2] ~= ARGV[3] then return stale(job[1], job[2]) end
if job[1] == 'succeeded' and job[3] == ARGV[4] then return usage_of(KEYS[13]) end
if job[1] ~= 'running' then return illegal(job[1], job[2]) end
finish_job(ARGV[2], ARGV[4], clock_ms())
return usage_of(KEYS[13])
