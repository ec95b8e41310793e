-- quotas: replaces the limits of tenants, and lets jobs in that older ones kept out.
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

redis.call('DEL', QUOTAS)
for i = 2, #ARGV, 2 do redis.call('HSET', QUOTAS, ARGV[i], ARGV[i + 1]) end
-- What is beyond this many is let in when a job of its tenant ends: where any is held, some run or are admitted.
local seen = {}
for _, job_id in ipairs(redis.call('ZRANGE', HELD, 0, 255)) do
  local tenant = redis.call('HGET', job_key(job_id), 'tenant')
  if not seen[tenant] then balance(tenant) end
  seen[tenant] = true
end
place(clock_ms())
return redis.call('HLEN', QUOTAS)
