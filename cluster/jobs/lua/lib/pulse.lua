-- Whether a lease that has ended means that its process is gone. Needs names.lua and policy.lua.

-- When nobody at all was heard for half a lease, Redis itself was away, and leases may have ended for that reason
-- alone: from then on everybody has one whole lease to come back before anything is taken from anybody.
local function beat(now_ms)
  local pulse = redis.call('HMGET', PULSE, 'heard_ms', 'grace_ms')
  local heard_ms, grace_ms = tonumber(pulse[1] or 0), tonumber(pulse[2] or 0)
  if now_ms - heard_ms > LEASE_MS / 2 then
    grace_ms = now_ms + LEASE_MS
    redis.call('HSET', PULSE, 'grace_ms', grace_ms)
  end
  redis.call('HSET', PULSE, 'heard_ms', now_ms)
  return now_ms >= grace_ms
end
