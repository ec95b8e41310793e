-- The end of a job. Needs names.lua, policy.lua, quota.lua and slot.lua.

-- Index entries of records that have expired; a few per ended job keep up with any load. Within a script the time
-- of expiry stands still, behind the clock: hence the margin.
local function forget_expired(now_ms)
  local gone = redis.call('ZRANGEBYSCORE', EXPIRING, '-inf', now_ms - 100, 'LIMIT', 0, 8)
  for _, job_id in ipairs(gone) do
    redis.call('ZREM', EXPIRING, job_id)
    if redis.call('EXISTS', job_key(job_id)) == 0 then redis.call('ZREM', index_key(job_id), job_id) end
  end
end

local function forget_images(job_id)
  local bytes = redis.call('STRLEN', images_key(job_id))
  if bytes == 0 then return end
  redis.call('DEL', images_key(job_id))
  redis.call('DECRBY', image_bytes_key(), bytes)
end

-- Moves a job that waits or runs to the terminal `state`, out of the queue and off its slot. `fields` are the
-- pairs to store with it.
-- Invariant: a terminal job is in no queue, holds no slot, no checkpoint and no images, has no owner, and has a time to
-- live.
local function close_job(job_id, state, fields, now_ms)
  local key = job_key(job_id)
  local row = redis.call('HMGET', key, 'replica', 'member', 'victim', 'router', 'counted', 'tenant')
  redis.call('HSET', key, 'state', state, 'finished_ms', now_ms, unpack(fields))
  redis.call('ZREM', QUEUE, row[2])
  redis.call('ZREM', WAITING, job_id)
  redis.call('SREM', owned_key(row[4]), job_id)
  redis.call('DEL', checkpoint_key(job_id))
  forget_images(job_id)
  if row[1] ~= '' then leave_slot(job_id, row[1], row[3]) end
  if row[5] then
    quotas().rests(row[6], job_id)
    quotas().step_out(row[6], row[2])
    quotas().balance(row[6])
  end
  local gone_ms = now_ms + RETENTION_S * 1000
  redis.call('PEXPIREAT', key, gone_ms)
  redis.call('PEXPIREAT', canvases_key(job_id), gone_ms)
  redis.call('ZADD', EXPIRING, gone_ms, job_id)
  forget_expired(now_ms)
  ring_watchers(job_id, state)
end
