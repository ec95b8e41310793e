-- heartbeat (router): renews the lease.
-- KEYS   1-12 the fixed keys of lib/names.lua; the set of owned jobs is derived from KEYS[1].
-- ARGV   1 limits (lib/policy.lua), 2 router.
-- From   any; no job changes.
-- Return {job id, ...}: what this router owns as far as Redis knows.
--@include names.lua
--@include policy.lua
--@include clock.lua
--@include pulse.lua

local now_ms = clock_ms()
beat(now_ms)
redis.call('ZADD', ROUTERS, now_ms + LEASE_MS, ARGV[2])
return redis.call('SMEMBERS', owned_key(ARGV[2]))
