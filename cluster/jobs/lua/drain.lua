-- drain: a replica gets no more jobs, and is told to give back those it has.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the replica's slot row, 14 its running jobs.
-- ARGV   1 limits (lib/policy.lua), 2 replica.
-- From   any; no job changes yet.
-- Return jobs it runs.
-- Errors REPLICA_NOT_FOUND.
--@include names.lua

if redis.call('EXISTS', KEYS[13]) == 0 then return redis.error_reply('REPLICA_NOT_FOUND none 0') end
redis.call('HSET', KEYS[13], 'draining', 1)
ring(ARGV[2], 'drain', '-')
return redis.call('HLEN', KEYS[14])
