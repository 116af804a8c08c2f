-- outbox_settle(delivery, attempt, outcome, status, error, delay): pending -> delivered, dead, or pending again.
-- Guards: a stale attempt can't reschedule or kill a delivery (though its success counts: the receiver has it);
-- the chain's next delivery becomes due only when this one has ended, so they stay in order.
-- Outcome `gone` (410) ends every waiting delivery of the chain and marks the address for a day.
local id, outcome = ARGV[2], ARGV[4]
local key = P .. 'delivery:' .. id
local found = redis.call('HMGET', key, 'state', 'attempt', 'job_id', 'url', 'chain')
if found[1] ~= 'pending' or (found[2] ~= ARGV[3] and outcome ~= 'delivered') then
  return 0
end
local chain = chain_of(found[5], found[3])
local pending = P .. 'pending:' .. chain

local function finish_one(one, state, problem)
  redis.call('HSET', P .. 'delivery:' .. one, 'state', state, 'error', problem, 'lease_until', '', 'next_at', '',
    'ended_at', seconds(now))
  redis.call('ZREM', P .. 'outbox', one)
  redis.call('LREM', pending, 1, one)
  if state == 'dead' then
    redis.call('ZADD', P .. 'outbox:dead', seconds(now), one)
  end
end

redis.call('HSET', key, 'status', ARGV[5])
redis.call('HINCRBY', P .. 'outcomes', outcome, 1) -- for the exporter
if outcome == 'retry' then
  local due = seconds(now + tonumber(ARGV[7]))
  redis.call('HSET', key, 'error', ARGV[6], 'lease_until', '', 'next_at', due)
  redis.call('ZADD', P .. 'outbox', due, id)
elseif outcome == 'gone' then
  redis.call('SET', P .. 'gone:' .. redis.sha1hex(found[4]), '1', 'EX', 86400)
  for _, one in ipairs(redis.call('LRANGE', pending, 0, -1)) do
    finish_one(one, 'dead', ARGV[6])
  end
else
  finish_one(id, outcome, ARGV[6])
  outbox_head(chain, now)
end
return 1
