-- outbox_take(delivery, lease seconds): leases one due delivery to the caller.
-- Guards: two workers can't send one delivery at once; a worker that dies lets it become due again; `attempt` rises
-- with every take, so a late report of an earlier one is recognised.
local id, outbox = ARGV[2], P .. 'outbox'
local due = redis.call('ZSCORE', outbox, id)
if not due or tonumber(due) > now then
  return {'none'}
end
local key = P .. 'delivery:' .. id
if redis.call('HGET', key, 'state') ~= 'pending' then
  redis.call('ZREM', outbox, id) -- it expired with its job, or it was a test event: `msg_<endpoint>_<random>`
  local endpoint = string.match(id, '^msg_(%w+)_%w+$')
  if endpoint then
    redis.call('LREM', P .. 'pending:we_' .. endpoint, 1, id)
    outbox_head('we_' .. endpoint, now)
  end
  return {'none'}
end
local until_ = seconds(now + tonumber(ARGV[3]))
redis.call('ZADD', outbox, until_, id)
redis.call('HSET', key, 'lease_until', until_, 'next_at', until_)
redis.call('HINCRBY', key, 'attempt', 1)
redis.call('HINCRBY', key, 'attempts', 1)
return {'ok', redis.call('HGETALL', key)}
