-- RUNNING -> QUEUED by release and reap. Needs names.lua, policy.lua, quota.lua, queue.lua, slot.lua and close.lua.
local HISTORY = 16

local function remember(history, row)
  local rows = {}
  if history and history ~= '' then rows = cjson.decode(history) end
  rows[#rows + 1] = row
  if #rows > HISTORY then table.remove(rows, 1) end
  return rows
end

-- What people read of a job that was lost too often: its last losses, without the ends that were nobody's fault.
local function told(rows, losses)
  local words = {}
  for i = #rows, 1, -1 do
    local row = rows[i]
    if #words < losses and row[7] == '1' then
      table.insert(words, 1, row[3] .. ' on ' .. row[2] .. ' (' .. row[4] .. ')')
    end
  end
  return table.concat(words, '; ')
end

-- Takes a running job off its slot and puts it back into the queue, with all it has. `loss` is '1' when the job may
-- be to blame: after MAX_LOSSES of these without a new canvas it fails, with its history.
local function requeue(job_id, reason, message, loss, now_ms)
  local key = job_key(job_id)
  local job = redis.call('HMGET', key, 'replica', 'member', 'router', 'epoch', 'losses', 'history', 'victim',
    'assigned_ms', 'priority', 'counted', 'tenant')
  local rows = remember(job[6], {tonumber(job[4]), job[1], reason, message, tonumber(job[8]), now_ms, loss})
  local losses = tonumber(job[5])
  if loss == '1' then losses = losses + 1 end
  redis.call('HSET', key, 'losses', losses, 'history', cjson.encode(rows))
  if losses >= MAX_LOSSES then
    close_job(job_id, 'failed', {
      'failure_code', 10, 'failure_reason', 'ATTEMPTS_EXHAUSTED',
      'failure_message', losses .. ' attempts in a row ended without a new canvas: ' .. told(rows, losses),
    }, now_ms)
    ring(job[3], 'failed', job_id)
    return
  end
  leave_slot(job_id, job[1], job[7])
  local member = job[2]
  if reason == 'PREEMPTED' then
    redis.call('HINCRBY', key, 'preemptions', 1)
    -- What it gained by waiting is spent: ahead of the job it made room for, it would take its slot right back.
    member = member_of_priority(member, tonumber(job[9]))
  end
  redis.call('HSET', key, 'state', 'queued', 'member', member)
  local counted = job[10] and job[11]
  if counted then quotas().rests(counted, job_id) end
  enqueue(job_id, member, now_ms, counted)
  ring(job[3], 'released:' .. job[4], job_id)
end
