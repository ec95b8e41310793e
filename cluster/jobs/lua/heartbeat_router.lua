-- heartbeat (router): renews the lease.
-- KEYS   1-7 the fixed keys of lib/names.lua.
-- ARGV   1 router, 2 lease in ms.
-- From   any; no job changes.
-- Return the end of the lease in ms.
--@include names.lua
--@include clock.lua

local lease_end_ms = clock_ms() + tonumber(ARGV[2])
redis.call('ZADD', ROUTERS, lease_end_ms, ARGV[1])
return lease_end_ms
