-- heartbeat (replica): renews the lease and the slot row. A replica that was not live brings free slots: waiting
-- jobs get them at once.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the replica's slot row, 14 its running jobs.
-- ARGV   1 limits (lib/policy.lua), 2 replica, 3 address, 4 model, 5 version, 6 slots, 7 stats as JSON.
-- From   any; no job changes but those that are placed.
-- Return {1 when it is to drain, {job id, "<epoch>" or "<epoch> preempt", ...}}: what this replica runs as far as
--        Redis knows.
--@include names.lua
--@include policy.lua
--@include clock.lua
--@include quota.lua
--@include queue.lua
--@include slot.lua
--@include close.lua
--@include apart.lua
--@include preempt.lua
--@include place.lua
--@include pulse.lua
--@include suspicion.lua

local replica, now_ms = ARGV[2], clock_ms()
beat(now_ms)
local lease_end_ms = tonumber(redis.call('ZSCORE', REPLICAS, replica) or 0)
local is_back = believe(replica, now_ms)
redis.call('HSET', KEYS[13], 'address', ARGV[3], 'model', ARGV[4], 'version', ARGV[5], 'slots', ARGV[6],
  'stats', ARGV[7])
redis.call('ZADD', REPLICAS, now_ms + LEASE_MS, replica)
if lease_end_ms <= now_ms or is_back then place(now_ms, tonumber(ARGV[6])) end
local draining = redis.call('HEXISTS', KEYS[13], 'draining')
return {draining, redis.call('HGETALL', KEYS[14])}
