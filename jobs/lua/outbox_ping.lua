-- outbox_ping(delivery, key, endpoint, url, data): a `webhook.test` event to one endpoint; it belongs to no job.
-- Guards: it goes by itself after what was pinged before, expires by itself, and lifts an earlier 410.
local id, key = ARGV[2], P .. 'delivery:' .. ARGV[2]
if redis.call('EXISTS', key) == 1 then
  return redis.call('HGETALL', key) -- sent again because the reply was lost
end
redis.call('DEL', P .. 'gone:' .. redis.sha1hex(ARGV[5]))
post(id, '', ARGV[3], {url = ARGV[5], endpoint = ARGV[4], chain = ARGV[4]}, 'webhook.test', ARGV[6])
redis.call('EXPIRE', key, conf.delivery_seconds)
redis.call('EXPIRE', P .. 'pending:' .. ARGV[4], conf.delivery_seconds)
return redis.call('HGETALL', key)
