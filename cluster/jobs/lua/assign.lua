-- assign: places waiting jobs on free slots, and drops those whose deadline has passed.
-- KEYS   1-7 the fixed keys of lib/names.lua; the jobs and replicas it picks are derived from KEYS[1].
-- ARGV   1 most waiting jobs to look at, 2 retention in s, 3 the job the caller asks about, or ''.
-- From   QUEUED.
-- Return {jobs placed}, and with ARGV[3], where that job exists, also {state, replica, address, epoch, canvases}.
--@include names.lua
--@include clock.lua
--@include queue.lua
--@include close.lua
--@include place.lua

local limit, retention_s = tonumber(ARGV[1]), tonumber(ARGV[2])
local now_ms = clock_ms()

-- Within a priority the earliest deadline is in front, so one look per priority finds all that have passed, also
-- when no slot is free.
local member = first_member(nil)
for _ = 1, limit do
  if not member then break end
  if member_deadline_ms(member) <= now_ms then
    local priority = string.sub(member, 1, 2)
    expire_waiting(member, now_ms, retention_s)
    member = redis.call('ZRANGEBYLEX', QUEUE, '[' .. priority, '+', 'LIMIT', 0, 1)[1]
  else
    member = first_member(member)
  end
end

local reply = {place(limit, now_ms, retention_s)}
if ARGV[3] ~= '' then
  local job = redis.call('HMGET', job_key(ARGV[3]), 'state', 'replica', 'address', 'epoch', 'canvases')
  if job[1] then for i = 1, 5 do reply[i + 1] = job[i] end end
end
return reply
