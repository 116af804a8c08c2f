-- endpoint_add(key, endpoint, record, limit): a key's webhook endpoint, unless it has `limit` of them.
-- Guards: the limit is counted in the same step, so requests that race can't pass it.
local all = P .. 'endpoints:' .. ARGV[2]
if redis.call('HEXISTS', all, ARGV[3]) == 0 and redis.call('HLEN', all) >= tonumber(ARGV[5]) then
  return 0
end
redis.call('HSET', all, ARGV[3], ARGV[4])
return 1
