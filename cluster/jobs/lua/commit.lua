-- commit: appends a canvas; with a finish reason, it is the last one and the job ends in the same step, so that no
-- reader ever sees a whole answer of a job that still runs.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record, 14 its canvases.
-- ARGV   1 limits (lib/policy.lua), 2 job id, 3 epoch, 4 index of the canvas, 5 the canvas, 6 answer tokens in it,
--        7 denoising steps it took, 8 finish reason or ''.
-- From   RUNNING under this epoch. A write repeated word for word under the epoch that made it changes nothing.
-- Return {} when the job runs on, what it took (lib/usage.lua) when it ended.
-- Errors JOB_NOT_FOUND, STALE_EPOCH, ILLEGAL_TRANSITION, CANVAS_OUT_OF_ORDER <state> <epoch> <next index>.
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
--@include suspicion.lua

local job_id, epoch, index = ARGV[2], ARGV[3], tonumber(ARGV[4])
local job = redis.call('HMGET', KEYS[13], 'state', 'epoch', 'canvases', 'generated_tokens', 'denoising_steps',
  'finish_reason', 'losses', 'replica')
local state, count = job[1], tonumber(job[3])
if not state then return not_found() end
if job[2] ~= epoch then return stale(state, job[2]) end

-- A repeat is a write whose answer was lost: the same canvas, under the same epoch.
local finish, repeated, proven = ARGV[8], false, false
local entry_id = string.format('%d-%s', index + 1, epoch)
if index < count and (finish == '' or index == count - 1) then
  local entry = redis.call('XRANGE', KEYS[14], entry_id, entry_id)[1]
  repeated = entry ~= nil and entry[2][2] == ARGV[5]
end
if repeated and finish == '' then return {} end
if repeated and finish == job[6] then return usage_of(KEYS[13]) end
if state ~= 'running' then return illegal(state, job[2]) end

if not repeated then
  if index ~= count then
    return redis.error_reply('CANVAS_OUT_OF_ORDER ' .. state .. ' ' .. job[2] .. ' ' .. count)
  end
  redis.call('XADD', KEYS[14], entry_id, 'c', ARGV[5])
  redis.call('HSET', KEYS[13], 'canvases', count + 1, 'generated_tokens', tonumber(job[4]) + tonumber(ARGV[6]),
    'denoising_steps', tonumber(job[5]) + tonumber(ARGV[7]))
  redis.call('DEL', checkpoint_key(job_id))
  if job[7] ~= '0' then
    redis.call('HSET', KEYS[13], 'losses', 0)
    redis.call('HDEL', APART, job_id)
  end
  proven = redis.call('SREM', fresh_key(job[8]), job_id) == 1
  if proven then absolve(job[8]) end
  ring_watchers(job_id, 'committed')
end
if finish == '' then
  -- For this a job on its last chance may wait, and others for the end of its apartness.
  if proven and redis.call('SCARD', fresh_key(job[8])) == 0 then place(clock_ms()) end
  return {}
end
finish_job(job_id, finish, clock_ms())
return usage_of(KEYS[13])
