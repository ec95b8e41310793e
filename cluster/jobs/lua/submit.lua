-- submit: stores a job and puts it into the queue.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record, 14 its images.
-- ARGV   1 limits (lib/policy.lua), 2 job id, 3 digest, 4 spec, 5 priority, 6 tenant, 7 seed, 8 prompt tokens,
--        9 timeout in ms or '', 10 router, 11 queue limit in jobs, 12 images or '', 13 limit of all images in bytes.
-- From   nothing. A job with this id and digest is left as it is.
-- Return 1 when the job was created, 0 when it was there.
-- Errors REQUEST_ID_REUSED (the id has another digest), QUEUE_FULL, IMAGES_FULL.
--@include names.lua
--@include policy.lua
--@include clock.lua
--@include queue.lua
--@include own.lua

local job_id, router = ARGV[2], ARGV[10]
local digest = redis.call('HGET', KEYS[13], 'digest')
if digest then
  if digest == ARGV[3] then return 0 end
  return redis.error_reply('REQUEST_ID_REUSED none 0')
end
if redis.call('ZCARD', QUEUE) >= tonumber(ARGV[11]) then
  return redis.error_reply('QUEUE_FULL none 0')
end
if ARGV[12] ~= '' then
  local bytes = tonumber(redis.call('GET', image_bytes_key()) or 0) + #ARGV[12]
  if bytes > tonumber(ARGV[13]) then return redis.error_reply('IMAGES_FULL none 0') end
  redis.call('SET', KEYS[14], ARGV[12])
  redis.call('SET', image_bytes_key(), bytes)
end

local now_ms = clock_ms()
local deadline_ms = ''
if ARGV[9] ~= '' then deadline_ms = now_ms + tonumber(ARGV[9]) end
local sequence = redis.call('INCR', SEQ)
local member = queue_member(tonumber(ARGV[5]), tonumber(deadline_ms), sequence, job_id)
redis.call('HSET', KEYS[13],
  'state', 'queued', 'digest', ARGV[3], 'spec', ARGV[4], 'priority', ARGV[5], 'tenant', ARGV[6], 'seed', ARGV[7],
  'prompt_tokens', ARGV[8], 'router', router, 'member', member, 'replica', '', 'address', '',
  'epoch', 0, 'attempts', 0, 'preemptions', 0, 'losses', 0, 'history', '',
  'canvases', 0, 'generated_tokens', 0, 'denoising_steps', 0,
  'created_ms', now_ms, 'started_ms', '', 'finished_ms', '', 'deadline_ms', deadline_ms)
enqueue(job_id, member, now_ms)
take_charge(job_id, router, now_ms)
redis.call('ZADD', JOBS, sequence, job_id)
return 1
