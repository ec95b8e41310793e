-- submit: stores a job and puts it into the queue.
-- KEYS   1-7 the fixed keys of lib/names.lua, 8 the job's record.
-- ARGV   1 job id, 2 digest, 3 spec, 4 priority, 5 tenant, 6 seed, 7 prompt tokens, 8 timeout in ms or '',
--        9 router, 10 queue limit in jobs.
-- From   nothing. A job with this id and digest is left as it is.
-- Return 1 when the job was created, 0 when it was there.
-- Errors REQUEST_ID_REUSED (the id has another digest), QUEUE_FULL.
--@include names.lua
--@include clock.lua
--@include queue.lua

local job_id = ARGV[1]
local digest = redis.call('HGET', KEYS[8], 'digest')
if digest then
  if digest == ARGV[2] then return 0 end
  return redis.error_reply('REQUEST_ID_REUSED none 0')
end
if redis.call('ZCARD', QUEUE) >= tonumber(ARGV[10]) then
  return redis.error_reply('QUEUE_FULL none 0')
end

local now_ms = clock_ms()
local deadline_ms = ''
if ARGV[8] ~= '' then deadline_ms = now_ms + tonumber(ARGV[8]) end
local sequence = redis.call('INCR', SEQ)
local member = queue_member(tonumber(ARGV[4]), tonumber(deadline_ms), sequence, job_id)
redis.call('HSET', KEYS[8],
  'state', 'queued', 'digest', ARGV[2], 'spec', ARGV[3], 'priority', ARGV[4], 'tenant', ARGV[5], 'seed', ARGV[6],
  'prompt_tokens', ARGV[7], 'router', ARGV[9], 'member', member, 'replica', '', 'address', '',
  'epoch', 0, 'attempts', 0, 'preemptions', 0, 'canvases', 0, 'generated_tokens', 0, 'denoising_steps', 0,
  'created_ms', now_ms, 'started_ms', '', 'finished_ms', '', 'deadline_ms', deadline_ms)
redis.call('ZADD', QUEUE, 0, member)
redis.call('ZADD', JOBS, sequence, job_id)
return 1
