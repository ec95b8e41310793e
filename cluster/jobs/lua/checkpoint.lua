-- checkpoint: saves the canvas in progress of a job that runs on.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record, 14 its checkpoint.
-- ARGV   1 limits (lib/policy.lua), 2 job id, 3 epoch, 4 model version, 5 canvas index, 6 step, 7 payload.
-- From   RUNNING under this epoch.
-- Return 1 when it was kept, 0 when its canvas is not the one in progress any more.
-- Errors JOB_NOT_FOUND, STALE_EPOCH, ILLEGAL_TRANSITION.
--@include fence.lua
--@include checkpoint.lua

local job = redis.call('HMGET', KEYS[13], 'state', 'epoch', 'canvases')
local refused = not_running(job[1], job[2], ARGV[3])
if refused then return refused end
return save_checkpoint(KEYS[14], job[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
