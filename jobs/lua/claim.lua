-- claim(model, node, schema, nonce): queued -> running, or running (lease expired) -> queued -> running.
-- Guards: one owner at a time (lease, rising token); a dead node's job goes first; attempts are charged for it;
-- canceled, expired and vanished entries never run; records newer than the node's schema stay for newer nodes;
-- a claim sent again because its reply was lost (same nonce) gets the same job instead of leaking a lease.
local model, node, schema, nonce = ARGV[2], ARGV[3], tonumber(ARGV[4]), P .. 'claim:' .. ARGV[5]

local function take(job)
  redis.call('SET', nonce, job.id, 'PX', string.format('%.0f', conf.lease_seconds * 1000))
  return reply(job)
end

local sent = redis.call('GET', nonce)
local before = sent and load(sent)
if before and before.state == 'running' and before.owner == node and tonumber(before.lease_until) > now then
  return reply(before)
end

local leases = P .. 'leases:' .. model
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', seconds(now), 'LIMIT', 0, 16)) do
  local job = load(id)
  if not job or job.state ~= 'running' then
    redis.call('ZREM', leases, id)
  elseif tonumber(job.schema) <= schema then
    lose(job)
    if job.state == 'queued' then
      dequeue(job)
      start(job, node)
      return take(job)
    end
  end
end

rise(model)
local budget = 256 -- entries removed in one call, so that a long run of dead ones can't block Redis; as each `more`
-- removed some, it is not answered for ever. Entries that are left (8 in each of 64 lanes) need no such bound.
local ranks = P .. 'lanes:' .. model
local lanes = redis.call('ZRANGE', ranks, 0, 63, 'WITHSCORES')
for i = 1, #lanes, 2 do
  local level, key = tonumber(string.sub(lanes[i], 1, 1)), string.sub(lanes[i], 3)
  local skipped = 0
  while skipped < 8 do
    local id = redis.call('ZRANGE', lane_key(model, level, key), skipped, skipped)[1]
    if not id then
      break
    end
    if budget == 0 then
      return {'more'}
    end
    local job = load(id)
    if not job or job.state ~= 'queued' then
      budget = budget - 1
      dequeue_entry(model, level, key, id)
    elseif overdue(job) then
      budget = budget - 1
      conclude(job, 'expired', {})
    elseif tonumber(job.schema) > schema then
      skipped = skipped + 1
    elseif redis.call('ZSCORE', ranks, lanes[i]) ~= lanes[i + 1] then
      return {'more'} -- its lane's rank was that of a head which was removed just now
    else
      dequeue(job)
      job.turn = charge_turn(job, tonumber(lanes[i + 1]))
      redis.call('HSET', P .. 'job:' .. job.id, 'turn', job.turn)
      start(job, node)
      return take(job)
    end
  end
end
return {'none'}
