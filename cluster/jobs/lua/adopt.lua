-- adopt: a router takes charge of jobs whose router is gone.
-- KEYS   1-12 the fixed keys of lib/names.lua; the sets of owned jobs are derived from KEYS[1].
-- ARGV   1 limits (lib/policy.lua), 2 the router that adopts, 3 most jobs to adopt.
-- From   QUEUED, RUNNING; the state stays. A lease that ended while Redis was away does not count (lib/pulse.lua).
-- Return {job id, ...}: what this router owns from now on.
--@include names.lua
--@include policy.lua
--@include clock.lua
--@include own.lua
--@include pulse.lua

local now_ms, router, left = clock_ms(), ARGV[2], tonumber(ARGV[3])
local adopted, believed = {}, beat(now_ms)
local gone = redis.call('ZRANGEBYSCORE', ROUTERS, '-inf', now_ms, 'WITHSCORES', 'LIMIT', 0, 16)
for i = 1, #gone, 2 do
  local other, lease_end_ms = gone[i], tonumber(gone[i + 1])
  -- A lease that was given back (0) needs no proof.
  if other ~= router and (believed or lease_end_ms == 0) then
    for _, job_id in ipairs(redis.call('SRANDMEMBER', owned_key(other), left - #adopted)) do
      give_to(job_id, other, router, now_ms)
      adopted[#adopted + 1] = job_id
    end
    if redis.call('SCARD', owned_key(other)) == 0 then redis.call('ZREM', ROUTERS, other) end
  end
end
return adopted
