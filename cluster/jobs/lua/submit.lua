-- submit: stores a job and puts it into the queue.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the job's record, 14 its images.
-- ARGV   1 limits (lib/policy.lua), 2 job id, 3 digest, 4 spec, 5 priority, 6 tenant, 7 seed, 8 prompt tokens,
--        9 timeout in ms or '', 10 router, 11 queue limit in jobs, 12 images or '', 13 limit of all images in bytes,
--        14 '1' where tenants have quotas.
-- From   nothing. A job with this id and digest is left as it is.
-- Return 1 when the job was created, 0 when it was there.
-- Errors REQUEST_ID_REUSED (the id has another digest), QUEUE_FULL, IMAGES_FULL, QUOTA_EXCEEDED <which> <limit> <ms to
--        come back in, 0 where nobody knows>. A job that was there spends nothing of its tenant's quota.
--@include names.lua
--@include policy.lua
--@include clock.lua
--@include quota.lua
--@include queue.lua
--@include own.lua
--@include bucket.lua

local job_id, router = ARGV[2], ARGV[10]
local digest = redis.call('HGET', KEYS[13], 'digest')
if digest then
  if digest == ARGV[3] then return 0 end
  return redis.error_reply('REQUEST_ID_REUSED none 0')
end
local now_ms, tenant, counted = clock_ms(), ARGV[6], nil
local quota, waiting = nil, redis.call('ZCARD', QUEUE)
if ARGV[14] == '1' then quota = quotas().quota_of(tenant) end
if quota then waiting = waiting + redis.call('ZCARD', held_key()) end
if waiting >= tonumber(ARGV[11]) then
  return redis.error_reply('QUEUE_FULL none 0')
end
local image_bytes = #ARGV[12]
if image_bytes > 0 then
  image_bytes = image_bytes + tonumber(redis.call('GET', image_bytes_key()) or 0)
  if image_bytes > tonumber(ARGV[13]) then return redis.error_reply('IMAGES_FULL none 0') end
end
if quota then
  if quota.queued and quotas().waiting_of(tenant) >= quota.queued then
    return redis.error_reply('QUOTA_EXCEEDED queued_jobs ' .. quota.queued .. ' 0')
  end
  local wait_ms = quota.per_s and take_token(tenant, quota, now_ms)
  if wait_ms then
    return redis.error_reply(string.format('QUOTA_EXCEEDED requests_per_s %.14g %d', quota.per_s, wait_ms))
  end
  if quota.running or quota.queued then counted = tenant end
end
if image_bytes > 0 then
  redis.call('SET', KEYS[14], ARGV[12])
  redis.call('SET', image_bytes_key(), image_bytes)
end
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
if counted then redis.call('HSET', KEYS[13], 'counted', 1) end
enqueue(job_id, member, now_ms, counted)
take_charge(job_id, router, now_ms)
redis.call('ZADD', index_key(job_id), sequence, job_id)
return 1
