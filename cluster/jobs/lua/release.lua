-- release: the replica that runs the job gives it back, with the canvas in progress if it could save it: it was
-- preempted, the replica drains or its engine broke, or the router's stream did.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record, 14 its checkpoint.
-- ARGV   1 limits (lib/policy.lua), 2 job id, 3 epoch, 4 reason, 5 message, 6 '1' when it counts as a loss,
--        7 '1' when the owner router may be gone: another live one gets the job,
--        8-11 model version, canvas index, step and payload of the checkpoint, or none of them.
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
--@include own.lua
--@include checkpoint.lua

local job_id = ARGV[2]
local job = redis.call('HMGET', KEYS[13], 'state', 'epoch', 'router', 'canvases')
local refused = not_running(job[1], job[2], ARGV[3])
if refused then return refused end

local now_ms = clock_ms()
if ARGV[8] then save_checkpoint(KEYS[14], job[4], ARGV[8], ARGV[9], ARGV[10], ARGV[11]) end
local heir = nil
if ARGV[7] == '1' then heir = other_router(job[3], now_ms) end
requeue(job_id, ARGV[4], ARGV[5], ARGV[6], now_ms)
if heir and redis.call('HGET', KEYS[13], 'state') == 'queued' then
  give_to(job_id, job[3], heir, now_ms)
  ring(heir, 'adopted', job_id)
end
place(now_ms)
return 1
