-- What one tenant may have of the cluster at once. Needs names.lua.
-- QUOTAS holds a row for each tenant that has limits of its own, and under '' the one of all others:
-- "<running canvases> <queued jobs> <requests a second> <burst>", '-' for no limit. A job that arrives while its tenant
-- has a row is counted: its record says so for as long as it lives, whatever becomes of the rows.
--
-- A counted job is in running_of:<tenant> while it runs, and in one of two sets while it waits: admitted:<tenant>, and
-- then in QUEUE like any other, or held_of:<tenant>, and then in HELD and not in QUEUE.
-- Invariants: running and admitted jobs are never more than the limit, but for those that were there when it was
-- lowered; jobs are held only while they are as many; every admitted member goes before every held one. So whatever is
-- in QUEUE may take a slot, and a tenant with a thousand jobs stands in nobody's way.
local BALANCED = 64

local function held_key() return BASE .. ':held' end

-- The functions are made by the first call: a job that is not counted must not pay for them.
local book = nil
local function quotas()
  if book then return book end
  book = {}

  local function held_of_key(tenant) return BASE .. ':held_of:' .. tenant end
  local function admitted_key(tenant) return BASE .. ':admitted:' .. tenant end
  local function running_of_key(tenant) return BASE .. ':running_of:' .. tenant end

  -- {running, queued, per_s, burst} as numbers or nil; nil for a tenant without a row.
  function book.quota_of(tenant)
    local rows = redis.call('HMGET', BASE .. ':quotas', tenant, '')
    local row = rows[1] or rows[2]
    if not row then return nil end
    local words = {}
    for word in string.gmatch(row, '%S+') do words[#words + 1] = word end
    return {running = tonumber(words[1]), queued = tonumber(words[2]), per_s = tonumber(words[3]),
      burst = tonumber(words[4])}
  end

  function book.waiting_of(tenant)
    return redis.call('ZCARD', admitted_key(tenant)) + redis.call('ZCARD', held_of_key(tenant))
  end

  local function admit(tenant, member)
    local job_id = string.sub(member, 37)
    if redis.call('ZREM', held_of_key(tenant), member) == 1 then redis.call('ZREM', held_key(), job_id) end
    redis.call('ZADD', admitted_key(tenant), 0, member)
    redis.call('ZADD', QUEUE, 0, member)
  end

  local function hold(tenant, member)
    redis.call('ZREM', admitted_key(tenant), member)
    redis.call('ZREM', QUEUE, member)
    redis.call('ZADD', held_of_key(tenant), 0, member)
    redis.call('ZADD', held_key(), tonumber(string.sub(member, 3, 18)), string.sub(member, 37))
  end

  -- Admits as many as the limit allows, and holds what is beyond it; no more than BALANCED of them at a time.
  function book.balance(tenant)
    local quota = book.quota_of(tenant)
    local running = quota and quota.running
    local most = math.huge
    if running then most = running - redis.call('SCARD', running_of_key(tenant)) end
    for _ = 1, BALANCED do
      local standing, member = redis.call('ZCARD', admitted_key(tenant)), nil
      if standing > most then
        member = redis.call('ZREVRANGEBYLEX', admitted_key(tenant), '+', '-', 'LIMIT', 0, 1)[1]
        if not member then return end
        hold(tenant, member)
      elseif standing < most then
        member = redis.call('ZRANGEBYLEX', held_of_key(tenant), '-', '+', 'LIMIT', 0, 1)[1]
        if not member then return end
        admit(tenant, member)
      else
        return
      end
    end
  end

  -- A counted job waits from now on. With the first one held it competes for its tenant's places by the queue's order.
  function book.line_up(tenant, member)
    admit(tenant, member)
    local first = redis.call('ZRANGEBYLEX', held_of_key(tenant), '-', '+', 'LIMIT', 0, 1)[1]
    if first then admit(tenant, first) end
    book.balance(tenant)
  end

  -- A counted job waits no more, wherever it did.
  function book.step_out(tenant, member)
    redis.call('ZREM', admitted_key(tenant), member)
    if redis.call('ZREM', held_of_key(tenant), member) == 1 then
      redis.call('ZREM', held_key(), string.sub(member, 37))
    end
  end

  -- A counted job runs from now on, or no more.
  function book.runs(tenant, job_id) redis.call('SADD', running_of_key(tenant), job_id) end
  function book.rests(tenant, job_id) redis.call('SREM', running_of_key(tenant), job_id) end

  return book
end
