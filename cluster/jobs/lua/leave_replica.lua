-- leave (replica): it leaves the slot table at once; what it still runs goes back to the queue.
-- KEYS   1-12 the fixed keys of lib/names.lua, 13 the replica's slot row, 14 its running jobs.
-- ARGV   1 limits (lib/policy.lua), 2 replica, 3 reason, 4 message, 5 '1' when it counts as a loss.
-- From   RUNNING on this replica.
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

local now_ms, jobs = clock_ms(), redis.call('HKEYS', KEYS[14])
redis.call('DEL', KEYS[13])
redis.call('ZREM', REPLICAS, ARGV[2])
for _, job_id in ipairs(jobs) do requeue(job_id, ARGV[3], ARGV[4], ARGV[5], now_ms) end
place(now_ms)
return #jobs
