-- view: the cluster at one moment; read-only.
-- KEYS   1-12 the fixed keys of lib/names.lua; the slot rows are derived from KEYS[1].
-- ARGV   none.
-- From   any; no job changes.
-- Return {jobs that wait, {live router, ...}, {{replica, ms left of its lease, active jobs, address, model,
--        version, slots, stats as JSON, 1 when it drains or else ''}, ...}}.
--@include names.lua
--@include clock.lua
--@include quota.lua

local now_ms = clock_ms()
local rows = {}
local leases = redis.call('ZRANGE', REPLICAS, 0, -1, 'WITHSCORES')
for i = 1, #leases, 2 do
  local replica = leases[i]
  local row = redis.call('HMGET', replica_key(replica), 'address', 'model', 'version', 'slots', 'stats', 'draining')
  if row[1] then
    rows[#rows + 1] = {replica, math.max(0, tonumber(leases[i + 1]) - now_ms),
      redis.call('HLEN', running_key(replica)), row[1], row[2], row[3], row[4], row[5], row[6] or ''}
  end
end
return {redis.call('ZCARD', QUEUE) + redis.call('ZCARD', held_key()), redis.call('ZRANGEBYSCORE', ROUTERS, '(' .. now_ms, '+inf'), rows}
