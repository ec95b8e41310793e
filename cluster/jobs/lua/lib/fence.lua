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
