-- assign: places waiting jobs on free slots, drops those whose deadline has passed, moves those forward that have
-- waited long, and marks victims for jobs that are more urgent.
-- KEYS   1-12 the fixed keys of lib/names.lua; the jobs and replicas it picks are derived from KEYS[1].
-- ARGV   1 limits (lib/policy.lua), 2 most waiting jobs to look at, 3 the job the caller asks about, or ''.
-- From   QUEUED.
-- Return {jobs placed}, and with ARGV[3], where that job exists, also {state, replica, address, epoch, canvases,
--        router}.
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

local limit, now_ms = tonumber(ARGV[2]), clock_ms()

-- Within a level the earliest deadline is in front, so one look per level finds all that have passed, also when no
-- slot is free.
local member = first_member(nil)
for _ = 1, limit do
  if not member then break end
  if member_deadline_ms(member) <= now_ms then
    local level = string.sub(member, 1, 2)
    expire_waiting(member, now_ms)
    member = redis.call('ZRANGEBYLEX', QUEUE, '[' .. level, '+', 'LIMIT', 0, 1)[1]
  else
    member = first_member(member)
  end
end

-- Jobs that their tenant's quota holds stand in no level; a look finds them by their deadlines, an arrival does not.
if ARGV[3] == '' then
  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', held_key(), '-inf', now_ms, 'LIMIT', 0, limit)) do
    expire_waiting(redis.call('HGET', job_key(job_id), 'member'), now_ms)
  end
end

-- One level for every AGING_MS of waiting, up to one above the most urgent priority (cluster/policy/ordering.py).
for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', WAITING, '-inf', now_ms - AGING_MS, 'LIMIT', 0, limit)) do
  local job = redis.call('HMGET', job_key(job_id), 'member', 'counted', 'tenant')
  local before, counted = job[1], job[2] and job[3]
  local rank = tonumber(string.sub(before, 1, 1))
  dequeue(job_id, before, counted)
  if rank > 4 then before = (rank - 1) .. string.sub(before, 2) end
  redis.call('HSET', job_key(job_id), 'member', before)
  enqueue(job_id, before, now_ms, counted)
end

local reply = {place(now_ms, limit)}
if ARGV[3] ~= '' then
  local job = redis.call('HMGET', job_key(ARGV[3]), 'state', 'replica', 'address', 'epoch', 'canvases', 'router')
  if job[1] then for i = 1, 6 do reply[i + 1] = job[i] end end
end
return reply
