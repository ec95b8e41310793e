-- The end of a job. Needs names.lua.

-- Index entries of records that have expired; a few per ended job keep up with any load.
local function forget_expired(now_ms)
  local gone = redis.call('ZRANGEBYSCORE', EXPIRING, '-inf', now_ms, 'LIMIT', 0, 8)
  for _, job_id in ipairs(gone) do
    redis.call('ZREM', EXPIRING, job_id)
    if redis.call('EXISTS', job_key(job_id)) == 0 then redis.call('ZREM', JOBS, job_id) end
  end
end

-- Moves a job that waits or runs to the terminal `state`, out of the queue and off its slot. `fields` are the
-- pairs to store with it.
-- Invariant: a terminal job is in no queue, holds no slot, and has a time to live.
local function close_job(job_id, state, fields, now_ms, retention_s)
  local key = job_key(job_id)
  local row = redis.call('HMGET', key, 'replica', 'member')
  redis.call('HSET', key, 'state', state, 'finished_ms', now_ms, unpack(fields))
  redis.call('ZREM', QUEUE, row[2])
  if row[1] ~= '' then redis.call('HDEL', running_key(row[1]), job_id) end
  redis.call('EXPIRE', key, retention_s)
  redis.call('EXPIRE', canvases_key(job_id), retention_s)
  redis.call('ZADD', EXPIRING, now_ms + retention_s * 1000, job_id)
  forget_expired(now_ms)
  ring_watchers(job_id, state)
end
