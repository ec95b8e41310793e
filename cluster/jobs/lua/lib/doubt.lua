-- Jobs in doubt: each run that was lost since the last canvas may have been the job's own fault. Needs names.lua and
-- policy.lua. DOUBTED holds those that run: job -> "<losses> <replica>".
-- Invariant: a job whose next loss is its last shares its replica with no other job in doubt. So of the jobs on a
-- replica that is lost at most one fails for it, and one that kills its replicas takes no innocent job along.

local function is_last_chance(losses) return losses > 0 and losses >= MAX_LOSSES - 1 end

-- `doubts` is replica -> the most losses of a job that it runs, where that is not 0.
local function add_doubt(doubts, replica, losses)
  doubts[replica] = math.max(doubts[replica] or 0, losses)
end

local function running_doubts()
  local doubts, flat = {}, redis.call('HGETALL', DOUBTED)
  for i = 2, #flat, 2 do
    local losses, replica = string.match(flat[i], '^(%d+) (.+)$')
    add_doubt(doubts, replica, tonumber(losses))
  end
  return doubts
end

local function may_run(doubts, losses, replica)
  local there = doubts[replica]
  return losses == 0 or not there or not (is_last_chance(there) or is_last_chance(losses))
end
