-- Replicas that routers could not reach. Needs names.lua.
-- One that heartbeats all the same (a network policy, a half-open link) has the fewest jobs, and would draw every
-- waiting one. So each time it is lost again without a canvas in between, its heartbeats are believed later.
local LONGEST_MS = 60000

local function suspect(replica, now_ms)
  local key = replica_key(replica)
  local row = redis.call('HMGET', key, 'address', 'suspect', 'strikes')
  if not row[1] or row[2] then return end
  local strikes = tonumber(row[3] or 0)
  local wait_ms = 0
  if strikes > 0 then wait_ms = math.min(500 * 2 ^ strikes, LONGEST_MS) end
  redis.call('HSET', key, 'suspect', now_ms + wait_ms, 'strikes', strikes + 1)
end

-- True when the replica takes jobs again from now on.
local function believe(replica, now_ms)
  local key = replica_key(replica)
  local until_ms = redis.call('HGET', key, 'suspect')
  if not until_ms or tonumber(until_ms) > now_ms then return false end
  redis.call('HDEL', key, 'suspect')
  return true
end

local function absolve(replica)
  redis.call('HDEL', replica_key(replica), 'strikes')
end
