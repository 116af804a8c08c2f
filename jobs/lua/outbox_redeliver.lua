-- outbox_redeliver(delivery): sends an ended delivery again, with the same id; a waiting one becomes due now.
-- Guards: it queues behind the chain's other waiting deliveries, so order holds; one under way is left alone.
local id = ARGV[2]
local key = P .. 'delivery:' .. id
local found = redis.call('HMGET', key, 'state', 'job_id', 'url', 'lease_until', 'chain')
if not found[1] then
  return 0
end
local chain = chain_of(found[5], found[2])
local pending = P .. 'pending:' .. chain
redis.call('DEL', P .. 'gone:' .. redis.sha1hex(found[3])) -- somebody says the address is good again
if found[1] == 'pending' then
  if found[4] == '' and redis.call('LINDEX', pending, 0) == id then
    outbox_head(chain, now)
  end
  return 1
end
redis.call('HSET', key, 'state', 'pending', 'attempts', '0', 'error', '', 'status', '', 'ended_at', '')
redis.call('ZREM', P .. 'outbox:dead', id)
if redis.call('RPUSH', pending, id) == 1 then
  outbox_head(chain, now)
end
if redis.call('EXISTS', P .. 'job:' .. found[2]) == 0 then
  redis.call('EXPIRE', pending, conf.delivery_seconds)
end
return 1
