-- What a job took, in the order that cluster.jobs.records.parse_usage reads. Needs nothing.
local function usage_of(key)
  return redis.call('HMGET', key, 'created_ms', 'started_ms', 'finished_ms', 'prompt_tokens', 'generated_tokens',
    'canvases', 'denoising_steps', 'attempts', 'preemptions')
end
