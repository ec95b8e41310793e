-- Keeps a canvas in progress; one of a canvas that is committed already is of no use. Needs nothing.
local function save_checkpoint(key, canvases, version, canvas_index, step, payload)
  if canvas_index ~= canvases then return 0 end
  redis.call('HSET', key, 'version', version, 'canvas_index', canvas_index, 'step', step, 'payload', payload)
  return 1
end
