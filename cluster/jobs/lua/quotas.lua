-- quotas: replaces the limits of tenants, and moves waiting jobs into the queue or out of it as they say.
-- KEYS   1-12 the fixed keys of lib/names.lua; the rows of tenants are derived from KEYS[1].
-- ARGV   1 limits (lib/policy.lua), 2.. tenant, its row (lib/quota.lua), ...; '' stands for all tenants without one.
-- From   QUEUED: jobs that were held may be assigned.
-- Return rows that there are now.
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

local TABLE = BASE .. ':quotas'
redis.call('DEL', TABLE)
for i = 2, #ARGV, 2 do redis.call('HSET', TABLE, ARGV[i], ARGV[i + 1]) end
-- Tenants with no job among these are looked at when one of theirs ends: where any is held, some run or are admitted.
local seen = {}
for _, job_id in ipairs(redis.call('ZRANGE', WAITING, 0, 999)) do
  local job = redis.call('HMGET', job_key(job_id), 'counted', 'tenant')
  if job[1] and not seen[job[2]] then
    quotas().balance(job[2])
    seen[job[2]] = true
  end
end
place(clock_ms())
return redis.call('HLEN', TABLE)
