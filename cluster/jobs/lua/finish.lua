-- finish: the answer is whole. The freed slot goes to the head of the queue in the same step.
-- KEYS   1-7 the fixed keys of lib/names.lua, 8 the job's record.
-- ARGV   1 job id, 2 epoch, 3 finish reason, 4 retention in s.
-- From   RUNNING under this epoch. Repeated word for word under the same epoch it changes nothing.
-- Return what the job took (lib/usage.lua).
-- Errors JOB_NOT_FOUND, STALE_EPOCH, ILLEGAL_TRANSITION.
--@include names.lua
--@include clock.lua
--@include fence.lua
--@include queue.lua
--@include close.lua
--@include place.lua
--@include finish.lua
--@include usage.lua

local job = redis.call('HMGET', KEYS[8], 'state', 'epoch', 'finish_reason')
if not job[1] then return not_found() end
if job[2] ~= ARGV[2] then return stale(job[1], job[2]) end
if job[1] == 'succeeded' and job[3] == ARGV[3] then return usage_of(KEYS[8]) end
if job[1] ~= 'running' then return illegal(job[1], job[2]) end
finish_job(ARGV[1], ARGV[3], clock_ms(), tonumber(ARGV[4]))
return usage_of(KEYS[8])
