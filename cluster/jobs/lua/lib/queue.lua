-- Queue members, byte for byte those of cluster/policy/ordering.py:
-- <9 - level>:<deadline ms, 16 digits>:<arrival, 16 digits>:<job id>. 2^53 - 1 stands for no deadline.
-- Needs names.lua and quota.lua.
local NO_DEADLINE_MS = 9007199254740991

local function queue_member(level, deadline_ms, sequence, job_id)
  return string.format('%d:%016d:%016d:', 9 - level, deadline_ms or NO_DEADLINE_MS, sequence) .. job_id
end

local function member_of_priority(member, priority) return (9 - priority) .. string.sub(member, 2) end
local function member_deadline_ms(member) return tonumber(string.sub(member, 3, 18)) end
local function member_job_id(member) return string.sub(member, 37) end

-- The first member, or the first one of the next lower level after `member`; nil when there is none.
local function first_member(member)
  local from = '-'
  if member then from = '(' .. string.sub(member, 1, 2) .. '\255' end
  return redis.call('ZRANGEBYLEX', QUEUE, from, '+', 'LIMIT', 0, 1)[1]
end

-- Puts a job into the queue; its member stays the same for as long as it lives, but for what it gains by waiting.
-- `counted` is the tenant of a job that counts against a quota (lib/quota.lua), or nil.
local function enqueue(job_id, member, now_ms, counted)
  if counted then quotas().line_up(counted, member) else redis.call('ZADD', QUEUE, 0, member) end
  redis.call('ZADD', WAITING, now_ms, job_id)
end

local function dequeue(job_id, member, counted)
  redis.call('ZREM', QUEUE, member)
  redis.call('ZREM', WAITING, job_id)
  if counted then quotas().step_out(counted, member) end
end
