-- endpoint_rotate(key, endpoint, old, new): replaces a webhook endpoint's sealed secrets if they still are the
-- text `old`. Guards: of two rotations none is lost, and a deleted endpoint leaves no secret behind. Replies
-- 'done', 'gone' or 'differs'.
local secrets = P .. 'apikeys:endpoints'
if redis.call('HEXISTS', P .. 'endpoints:' .. ARGV[2], ARGV[3]) == 0 then
  return 'gone'
end
local found = redis.call('HGET', secrets, ARGV[3]) or ''
-- `new` is there already when the reply was lost and the call is made again.
if found ~= ARGV[4] and found ~= ARGV[5] then
  return 'differs'
end
redis.call('HSET', secrets, ARGV[3], ARGV[5])
return 'done'
