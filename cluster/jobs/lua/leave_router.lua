-- leave (router): it gives its lease back, and the other routers are told to look for its jobs.
-- KEYS   1-12 the fixed keys of lib/names.lua.
-- ARGV   1 limits (lib/policy.lua), 2 router.
-- From   any; no job changes.
-- Return live routers that were told.
--@include names.lua
--@include clock.lua

-- Without a job it is gone; with some it stays known, as one whose lease is over, until they are adopted.
if redis.call('SCARD', owned_key(ARGV[2])) == 0 then
  redis.call('ZREM', ROUTERS, ARGV[2])
  return 0
end
redis.call('ZADD', ROUTERS, 0, ARGV[2])
local live = redis.call('ZRANGEBYSCORE', ROUTERS, '(' .. clock_ms(), '+inf')
for _, router in ipairs(live) do ring(router, 'look', '-') end
return #live
