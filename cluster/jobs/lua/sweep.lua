-- reap, by lease: replicas whose lease has ended are gone, and what they ran goes back to the queue.
-- KEYS   1-12 the fixed keys of lib/names.lua; the rows of replicas are derived from KEYS[1].
-- ARGV   1 limits (lib/policy.lua), 2 most jobs to move.
-- From   RUNNING on a replica whose lease has ended, unless Redis itself was away (lib/pulse.lua).
-- Return jobs moved.
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
--@include requeue.lua
--@include pulse.lua

local now_ms, left = clock_ms(), tonumber(ARGV[2])
if not beat(now_ms) then return 0 end
local moved = 0
for _, replica in ipairs(redis.call('ZRANGEBYSCORE', REPLICAS, '-inf', now_ms, 'LIMIT', 0, 16)) do
  local jobs = redis.call('HKEYS', running_key(replica))
  for _, job_id in ipairs(jobs) do
    if moved == left then break end
    requeue(job_id, 'LEASE_EXPIRED', 'the replica was not heard of for a whole lease', '1', now_ms)
    moved = moved + 1
  end
  if redis.call('HLEN', running_key(replica)) == 0 then
    redis.call('DEL', replica_key(replica))
    redis.call('ZREM', REPLICAS, replica)
  end
end
if moved > 0 then place(now_ms) end
return moved
