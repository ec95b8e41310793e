-- Requests a second: a bucket of `burst` tokens that fills at `per_s`. Needs names.lua.

-- Takes a token; returns nil, or in how many ms there will be one. A full bucket needs no key.
local function take_token(tenant, quota, now_ms)
  local key = BASE .. ':bucket:' .. tenant
  local row = redis.call('HMGET', key, 'tokens', 'at_ms')
  local since_ms = math.max(0, now_ms - tonumber(row[2] or now_ms))
  local tokens = math.min(quota.burst, tonumber(row[1] or quota.burst) + since_ms * quota.per_s / 1000)
  if tokens < 1 then return math.ceil((1 - tokens) * 1000 / quota.per_s) end
  redis.call('HSET', key, 'tokens', string.format('%.9f', tokens - 1), 'at_ms', now_ms)
  redis.call('PEXPIRE', key, math.ceil(quota.burst * 1000 / quota.per_s) + 1000)
  return nil
end
