-- commit: appends a canvas; with a finish reason, it is the last one and the job ends in the same step, so that no
-- reader ever sees a whole answer of a job that still runs.
-- KEYS   1-7 the fixed keys of lib/names.lua, 8 the job's record, 9 its canvases.
-- ARGV   1 job id, 2 epoch, 3 index of the canvas, 4 the canvas, 5 answer tokens in it, 6 denoising steps it took,
--        7 finish reason or '', 8 retention in s.
-- From   RUNNING under this epoch. A write repeated word for word under the epoch that made it changes nothing.
-- Return {} when the job runs on, what it took (lib/usage.lua) when it ended.
-- Errors JOB_NOT_FOUND, STALE_EPOCH, ILLEGAL_TRANSITION, CANVAS_OUT_OF_ORDER <state> <epoch> <next index>.
--@include names.lua
--@include clock.lua
--@include fence.lua
--@include queue.lua
--@include close.lua
--@include place.lua
--@include finish.lua
--@include usage.lua

local job_id, epoch, index = ARGV[1], ARGV[2], tonumber(ARGV[3])
local job = redis.call('HMGET', KEYS[8], 'state', 'epoch', 'canvases', 'generated_tokens', 'denoising_steps',
  'finish_reason')
local state, count = job[1], tonumber(job[3])
if not state then return not_found() end
if job[2] ~= epoch then return stale(state, job[2]) end

-- A repeat is a write whose answer was lost: the same canvas, under the same epoch.
local finish, repeated = ARGV[7], false
local entry_id = string.format('%d-%s', index + 1, epoch)
if index < count and (finish == '' or index == count - 1) then
  local entry = redis.call('XRANGE', KEYS[9], entry_id, entry_id)[1]
  repeated = entry ~= nil and entry[2][2] == ARGV[4]
end
if repeated and finish == '' then return {} end
if repeated and finish == job[6] then return usage_of(KEYS[8]) end
if state ~= 'running' then return illegal(state, job[2]) end

if not repeated then
  if index ~= count then
    return redis.error_reply('CANVAS_OUT_OF_ORDER ' .. state .. ' ' .. job[2] .. ' ' .. count)
  end
  redis.call('XADD', KEYS[9], entry_id, 'c', ARGV[4])
  redis.call('HSET', KEYS[8], 'canvases', count + 1, 'generated_tokens', tonumber(job[4]) + tonumber(ARGV[5]),
    'denoising_steps', tonumber(job[5]) + tonumber(ARGV[6]))
  ring_watchers(job_id, 'committed')
end
if finish == '' then return {} end
finish_job(job_id, finish, clock_ms(), tonumber(ARGV[8]))
return usage_of(KEYS[8])
