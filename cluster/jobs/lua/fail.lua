-- fail: the job ends without a whole answer. The replica that runs it gives its epoch; the owner router gives none.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record.
-- ARGV   1 limits (lib/policy.lua), 2 job id, 3 epoch or '', 4 code (google.rpc), 5 reason, 6 message.
-- From   RUNNING under this epoch; without an epoch QUEUED or RUNNING. Repeated word for word it changes
--        nothing.
-- Return 1 when the job ended by this call, 0 when it had.
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

local job_id, by_owner = ARGV[2], ARGV[3] == ''
local job = redis.call('HMGET', KEYS[13], 'state', 'epoch', 'router', 'replica',
  'failure_code', 'failure_reason', 'failure_message')
local state = job[1]
if not state then return not_found() end
if not by_owner and job[2] ~= ARGV[3] then return stale(state, job[2]) end
if state == 'failed' and job[5] == ARGV[4] and job[6] == ARGV[5] and job[7] == ARGV[6] then return 0 end
if state ~= 'running' and not (by_owner and state == 'queued') then return illegal(state, job[2]) end

local now_ms = clock_ms()
close_job(job_id, 'failed', {'failure_code', ARGV[4], 'failure_reason', ARGV[5], 'failure_message', ARGV[6]}, now_ms)
ring(job[3], 'failed', job_id)
-- The replica hears of it only when it was not the replica that said so.
if by_owner and state == 'running' then ring(job[4], 'failed', job_id) end
place(now_ms)
return 1
