-- RUNNING -> SUCCEEDED, shared by finish.lua and by a commit that ends the answer. Needs close.lua and place.lua.
local function finish_job(job_id, reason, now_ms)
  close_job(job_id, 'succeeded', {'finish_reason', reason}, now_ms)
  place(now_ms)
end
