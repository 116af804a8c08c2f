-- endpoint_change(key, endpoint, old, new): replaces a webhook endpoint's record if it still is the text `old`.
-- Guards: a change never brings a deleted endpoint back, nor undoes another's. Replies 'done', 'gone' or 'differs'.
local all = P .. 'endpoints:' .. ARGV[2]
local found = redis.call('HGET', all, ARGV[3])
if not found then
  return 'gone'
end
-- `new` is there already when the reply was lost and the call is made again.
if found ~= ARGV[4] and found ~= ARGV[5] then
  return 'differs'
end
redis.call('HSET', all, ARGV[3], ARGV[5])
return 'done'
