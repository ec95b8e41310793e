-- heartbeat (replica): renews the lease and the slot row. A replica that was not live brings free slots: waiting
-- jobs get them at once.
-- KEYS   1-7 the fixed keys of lib/names.lua, 8 the replica's slot row, 9 its running jobs.
-- ARGV   1 replica, 2 address, 3 model, 4 version, 5 slots, 6 stats as JSON, 7 lease in ms, 8 retention in s.
-- From   any; no job changes but those that are placed.
-- Return {job id, epoch, job id, epoch, ...}: what this replica runs as far as Redis knows.
--@include names.lua
--@include clock.lua
--@include queue.lua
--@include close.lua
--@include place.lua

local replica, now_ms = ARGV[1], clock_ms()
local lease_end_ms = tonumber(redis.call('ZSCORE', REPLICAS, replica) or 0)
redis.call('HSET', KEYS[8], 'address', ARGV[2], 'model', ARGV[3], 'version', ARGV[4], 'slots', ARGV[5],
  'stats', ARGV[6])
redis.call('ZADD', REPLICAS, now_ms + tonumber(ARGV[7]), replica)
if lease_end_ms <= now_ms then place(128, now_ms, tonumber(ARGV[8])) end
return redis.call('HGETALL', KEYS[9])
