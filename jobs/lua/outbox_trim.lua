-- outbox_trim(limit): the dead letter of webhooks forgets those that ended longer ago than their records are kept.
-- Guards: test events, and deliveries that end after their job is gone, are taken out by no purge.
local old = redis.call('ZRANGEBYSCORE', P .. 'outbox:dead', '-inf', seconds(now - conf.delivery_seconds), 'LIMIT', 0, ARGV[2])
for _, id in ipairs(old) do
  redis.call('ZREM', P .. 'outbox:dead', id)
end
return #old
