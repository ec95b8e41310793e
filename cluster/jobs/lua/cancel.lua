-- cancel: the caller no longer wants the answer. Written here first, then told to the replica.
-- KEYS   1-7 the fixed keys of lib/names.lua, 8 the job's record.
-- ARGV   1 job id, 2 retention in s.
-- From   QUEUED, RUNNING. A job that has ended is left as it is.
-- Return {now in ms, field, value, field, value, ...}: the record as it stands now.
-- Errors JOB_NOT_FOUND.
--@include names.lua
--@include clock.lua
--@include fence.lua
--@include queue.lua
--@include close.lua
--@include place.lua

local job_id, now_ms, retention_s = ARGV[1], clock_ms(), tonumber(ARGV[2])
local job = redis.call('HMGET', KEYS[8], 'state', 'router', 'replica')
local state = job[1]
if not state then return not_found() end
if state == 'queued' or state == 'running' then
  close_job(job_id, 'cancelled', {}, now_ms, retention_s)
  ring(job[2], 'cancelled', job_id)
  if state == 'running' then ring(job[3], 'cancelled', job_id) end
  place(8, now_ms, retention_s)
end
local reply = redis.call('HGETALL', KEYS[8])
table.insert(reply, 1, now_ms)
return reply
