-- The limits that the store was opened with: ARGV[1] of every script that moves jobs, five numbers.
local limits = {}
for word in string.gmatch(ARGV[1], '%d+') do limits[#limits + 1] = tonumber(word) end
local RETENTION_S, MAX_LOSSES, MAX_PREEMPTIONS, AGING_MS, LEASE_MS = unpack(limits)
