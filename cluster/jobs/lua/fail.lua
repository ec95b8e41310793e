-- fail: the job ends without a whole answer. The replica that runs it gives its epoch; the owner router gives none.
-- KEYS   1-7 the fixed keys of lib/names.lua, 8 the job's record.
-- ARGV   1 job id, 2 epoch or '', 3 code (google.rpc), 4 reason, 5 message, 6 retention in s.
-- From   RUNNING under this epoch; without an epoch QUEUED or RUNNING. Repeated word for word it changes
--        nothing.
-- Return 1 when the job ended by this call, 0 when it had.
-- Errors JOB_NOT_FOUND, STALE_EPOCH, ILLEGAL_TRANSITION.
--@include names.lua
--@include clock.lua
--@include fence.lua
--@include queue.lua
--@include close.lua
--@include place.lua

local job_id, by_owner = ARGV[1], ARGV[2] == ''
local job = redis.call('HMGET', KEYS[8], 'state', 'epoch', 'router', 'replica',
  'failure_code', 'failure_reason', 'failure_message')
local state = job[1]
if not state then return not_found() end
if not by_owner and job[2] ~= ARGV[2] then return stale(state, job[2]) end
if state == 'failed' and job[5] == ARGV[3] and job[6] == ARGV[4] and job[7] == ARGV[5] then return 0 end
if state ~= 'running' and not (by_owner and state == 'queued') then return illegal(state, job[2]) end

local now_ms, retention_s = clock_ms(), tonumber(ARGV[6])
close_job(job_id, 'failed', {'failure_code', ARGV[3], 'failure_reason', ARGV[4], 'failure_message', ARGV[5]},
  now_ms, retention_s)
ring(job[3], 'failed', job_id)
-- The replica hears of it only when it was not the replica that said so.
if by_owner and state == 'running' then ring(job[4], 'failed', job_id) end
place(8, now_ms, retention_s)
return 1
