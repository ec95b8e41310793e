-- Last chances. Needs names.lua and policy.lua.
-- A job that was lost so often that its next loss would be its last runs apart from all others that may be to blame:
-- it starts where every job has committed a canvas since it was assigned, and until it has done so itself nothing
-- else starts there. fresh:<replica> holds the jobs without such a canvas; APART is job -> replica.
-- Invariant: a job in APART is the only fresh one on its replica. So a job that kills its replicas fails alone.

local function is_last_chance(losses) return losses > 0 and losses >= MAX_LOSSES - 1 end

-- Replica -> true where a job runs on its last chance.
local function replicas_apart()
  local apart = {}
  for _, replica in ipairs(redis.call('HVALS', APART)) do apart[replica] = true end
  return apart
end
