-- Milliseconds since the Unix epoch by the clock of Redis, the only clock that decides anything.
local function clock_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
