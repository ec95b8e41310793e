-- Refusals. The word after the code is the job's state, then its epoch; the store makes the sentence.
local function not_found()
  return redis.error_reply('JOB_NOT_FOUND none 0')
end

local function stale(state, epoch)
  return redis.error_reply('STALE_EPOCH ' .. state .. ' ' .. epoch)
end

local function illegal(state, epoch)
  return redis.error_reply('ILLEGAL_TRANSITION ' .. state .. ' ' .. epoch)
end

-- Why a job must not be written to by whoever ran it under `epoch`; nil when it runs under it.
local function not_running(state, current, epoch)
  if not state then return not_found() end
  if current ~= epoch then return stale(state, current) end
  if state ~= 'running' then return illegal(state, current) end
  return nil
end
