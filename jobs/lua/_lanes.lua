-- Prelude 2 of 4: lanes. A lane is one key's waiting jobs of one model and priority, oldest first (score: queued_at).
-- lanes:<model> ranks the lanes by (effective level, virtual time): start-time fair queueing within a level
-- (P. Goyal et al., "Start-time Fair Queuing", 1996, with every job of cost 1), strict order between levels.
-- A lane's effective level follows its oldest job: one level up per `aging_seconds` waited.
local LEVELS = {high = 0, normal = 1, low = 2}
local SPAN = 2 ^ 40 -- more turns than one level ever counts

local function lane_key(model, level, key)
  return P .. 'lane:' .. model .. ':' .. level .. ':' .. key
end

-- Recompute one lane's rank from its head, and when it next rises a level.
local function place(model, level, key)
  local lanes, rising, vtime = P .. 'lanes:' .. model, P .. 'rising:' .. model, P .. 'vtime:' .. model
  local lane = level .. ':' .. key
  local head = redis.call('ZRANGE', lane_key(model, level, key), 0, 0, 'WITHSCORES')
  if not head[1] then
    if redis.call('ZREM', lanes, lane) == 1 then
      redis.call('ZREM', rising, lane)
      if redis.call('EXISTS', lanes) == 0 then
        redis.call('DEL', vtime) -- nobody waits: everybody starts even again, and the hash stays small
      end
    end
    return
  end
  local queued_at = tonumber(head[2])
  local steps = math.max(0, math.floor((now - queued_at) / conf.aging_seconds))
  local effective = math.max(0, level - steps)
  local turns = redis.call('HMGET', vtime, effective, effective .. ':' .. key)
  local turn = math.max(tonumber(turns[1] or 0), tonumber(turns[2] or 0))
  redis.call('ZADD', lanes, string.format('%.0f', effective * SPAN + turn), lane)
  if effective > 0 then
    redis.call('ZADD', rising, seconds(queued_at + (steps + 1) * conf.aging_seconds), lane)
  else
    redis.call('ZREM', rising, lane)
  end
end

-- Put a job into its lane. A returned job keeps its queued_at, so it is in front of everything submitted later.
local function enqueue(job)
  local level = LEVELS[job.priority]
  if redis.call('ZADD', lane_key(job.model, level, job.key_id), job.queued_at, job.id) == 1 then
    redis.call('HINCRBY', P .. 'waiting:' .. job.model, level, 1)
  end
  redis.call('SADD', P .. 'queues', job.model)
  place(job.model, level, job.key_id)
  local wake = P .. 'wake:' .. job.model
  redis.call('LPUSH', wake, '1')
  redis.call('LTRIM', wake, 0, 63)
  redis.call('EXPIRE', wake, 3600)
end

local function dequeue_entry(model, level, key, id)
  if redis.call('ZREM', lane_key(model, level, key), id) == 1 then
    redis.call('HINCRBY', P .. 'waiting:' .. model, level, -1)
  end
  place(model, level, key)
end

local function dequeue(job)
  dequeue_entry(job.model, LEVELS[job.priority], job.key_id, job.id)
end

-- Count one turn for a key whose lane was just chosen, and re-rank all its lanes.
local function charge_turn(job, score)
  local vtime = P .. 'vtime:' .. job.model
  local effective = math.floor(score / SPAN)
  local turn = score - effective * SPAN
  redis.call('HSET', vtime, effective, string.format('%.0f', turn),
    effective .. ':' .. job.key_id, string.format('%.0f', turn + 1))
  for level = 0, 2 do
    place(job.model, level, job.key_id)
  end
  if redis.call('EXISTS', P .. 'lanes:' .. job.model) == 0 then
    redis.call('DEL', vtime) -- as in place: the lane's last job was just taken
  end
  return tostring(effective)
end

-- A job that was given back did not use its turn.
local function refund_turn(job)
  local vtime, field = P .. 'vtime:' .. job.model, (job.turn or '') .. ':' .. job.key_id
  if tonumber(redis.call('HGET', vtime, field) or 0) > 0 then
    redis.call('HINCRBY', vtime, field, -1)
  end
end

-- Lift lanes whose oldest job has waited past its next level; bounded, since sweeps call it too.
local function rise(model)
  local due = redis.call('ZRANGEBYSCORE', P .. 'rising:' .. model, '-inf', seconds(now), 'LIMIT', 0, 64)
  for _, lane in ipairs(due) do
    place(model, tonumber(string.sub(lane, 1, 1)), string.sub(lane, 3))
  end
  return #due
end

local function lease_take(job)
  if redis.call('ZADD', P .. 'leases:' .. job.model, job.lease_until, job.id) == 1 then
    redis.call('HINCRBY', P .. 'running:' .. job.model, LEVELS[job.priority], 1)
  end
end

local function lease_drop(job)
  if redis.call('ZREM', P .. 'leases:' .. job.model, job.id) == 1 then
    redis.call('HINCRBY', P .. 'running:' .. job.model, LEVELS[job.priority], -1)
  end
end
