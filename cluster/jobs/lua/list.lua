-- list: one page of jobs, the newest first; index entries of records that have expired are dropped on the way.
-- KEYS   1-12 the fixed keys of lib/names.lua; the records are derived from KEYS[1].
-- ARGV   1 where to start: '+inf' or '(' and the arrival sequence that the last page ended with, 2 most jobs to
--        return, 3 most jobs to look at, 4 only jobs in this state, or '', 5 only jobs of this tenant, or '' for all that have
--        no tenant's index, 6.. fields to return, 'state' first.
-- From   any; no job changes.
-- Return {now in ms, arrival sequence that this page ended with or '' when there is no more,
--         {{job id, value of each field}, ...}}.
--@include names.lua
--@include clock.lua

local from, page_size, to_scan, wanted = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local fields, rows, INDEX = {}, {}, JOBS
if ARGV[5] ~= '' then INDEX = JOBS .. ':' .. ARGV[5] end
for i = 6, #ARGV do fields[#fields + 1] = ARGV[i] end

local function take(job_id)
  local row = redis.call('HMGET', job_key(job_id), unpack(fields))
  if not row[1] then
    redis.call('ZREM', INDEX, job_id)
  elseif wanted == '' or row[1] == wanted then
    table.insert(row, 1, job_id)
    rows[#rows + 1] = row
  end
end

local more = true
while more and #rows < page_size and to_scan > 0 do
  local chunk = math.min(to_scan, 100)
  local found = redis.call('ZREVRANGEBYSCORE', INDEX, from, '-inf', 'WITHSCORES', 'LIMIT', 0, chunk)
  more, to_scan = #found == 2 * chunk, to_scan - chunk
  for i = 1, #found, 2 do
    take(found[i])
    from = '(' .. found[i + 1]
    if #rows == page_size then break end
  end
end

local last = ''
if from ~= '+inf' and redis.call('ZCOUNT', INDEX, '-inf', from) > 0 then last = string.sub(from, 2) end
return {clock_ms(), last, rows}
