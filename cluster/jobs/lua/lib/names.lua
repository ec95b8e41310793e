-- Names. Every script is called with the same fixed KEYS first; rows that a script picks itself (the head of the
-- queue, the chosen replica) are derived from the namespace key and share its hash tag, hence its slot.
local BASE, QUEUE, REPLICAS, ROUTERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local JOBS, EXPIRING, SEQ, WAITING = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local VICTIMS, MARKED, APART, PULSE = KEYS[9], KEYS[10], KEYS[11], KEYS[12]

local function job_key(job_id) return BASE .. ':job:' .. job_id end
local function canvases_key(job_id) return BASE .. ':canvases:' .. job_id end
local function checkpoint_key(job_id) return BASE .. ':checkpoint:' .. job_id end
local function images_key(job_id) return BASE .. ':images:' .. job_id end
local function image_bytes_key() return BASE .. ':image_bytes' end
local function replica_key(replica) return BASE .. ':replica:' .. replica end
local function running_key(replica) return BASE .. ':running:' .. replica end
local function fresh_key(replica) return BASE .. ':fresh:' .. replica end
local function owned_key(router) return BASE .. ':owned:' .. router end

-- The index that a job is listed in. With credentials a job's id begins with its tenant and a slash, which no request
-- id can hold (cluster/security/identity.py): each tenant has an index of its own.
local function index_key(job_id)
  local slash = string.find(job_id, '/', 1, true)
  if slash then return JOBS .. ':' .. string.sub(job_id, 1, slash - 1) end
  return JOBS
end

-- Rings are hints: whoever hears one reads the keys.
local function ring(process, kind, job_id)
  redis.call('PUBLISH', BASE .. ':bell:process:' .. process, kind .. ' ' .. job_id)
end

local function ring_watchers(job_id, event)
  redis.call('PUBLISH', BASE .. ':bell:job:' .. job_id, event)
end
