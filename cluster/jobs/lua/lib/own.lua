-- Which router has charge of a job. Needs names.lua and policy.lua.

-- Invariant: a job that has not ended is in owned:<router> of its own router and of no other, and that router is in
-- ROUTERS, also if it was never heard: else nobody would find its jobs when it is gone.
local function take_charge(job_id, router, now_ms)
  redis.call('SADD', owned_key(router), job_id)
  redis.call('ZADD', ROUTERS, 'NX', now_ms + LEASE_MS, router)
end

local function give_to(job_id, from, to, now_ms)
  redis.call('SREM', owned_key(from), job_id)
  redis.call('HSET', job_key(job_id), 'router', to)
  take_charge(job_id, to, now_ms)
end

-- The live router other than `but` that has charge of the fewest jobs; nil when there is none.
local function other_router(but, now_ms)
  local heir, fewest = nil, nil
  for _, router in ipairs(redis.call('ZRANGEBYSCORE', ROUTERS, '(' .. now_ms, '+inf')) do
    local owned = redis.call('SCARD', owned_key(router))
    if router ~= but and (heir == nil or owned < fewest) then heir, fewest = router, owned end
  end
  return heir
end
