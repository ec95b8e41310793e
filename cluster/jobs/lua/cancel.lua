-- cancel: the caller no longer wants the answer. Written here first, then told to the replica.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record.
-- ARGV   1 limits (lib/policy.lua), 2 job id.
-- From   QUEUED, RUNNING. A job that has ended is left as it is.
-- Return {now in ms, field, value, field, value, ...}: the record as it stands now.
-- Errors JOB_NOT_FOUND.
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

local job_id, now_ms = ARGV[2], clock_ms()
local job = redis.call('HMGET', KEYS[13], 'state', 'router', 'replica')
local state = job[1]
if not state then return not_found() end
if state == 'queued' or state == 'running' then
  close_job(job_id, 'cancelled', {}, now_ms)
  ring(job[2], 'cancelled', job_id)
  if state == 'running' then ring(job[3], 'cancelled', job_id) end
  place(now_ms)
end
local reply = redis.call('HGETALL', KEYS[13])
table.insert(reply, 1, now_ms)
return reply
