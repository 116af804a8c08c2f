-- key_change(key, old, new, overlap): replaces an API key's record if it still is the text `old`, and says what
-- opens it from now on. overlap: seconds that the values before go on, at most; '' leaves them as they are.
-- Guards: no change undoes another's, and nothing opens a revoked key. Replies 'done', 'gone' or 'differs'.
local id, old, new, overlap = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local records, hashes = P .. 'apikeys', P .. 'apikeys:hashes'
local found = redis.call('HGET', records, id)
if not found then
  return 'gone'
end
-- `new` is there already when the reply was lost and the call is made again.
if found ~= old and found ~= new then
  return 'differs'
end
redis.call('HSET', records, id, new)
local record = cjson.decode(new)
local revoked = record.revoked_at and record.revoked_at ~= cjson.null
local all = redis.call('HGETALL', hashes)
for i = 1, #all, 2 do
  local digest, whose, ends = all[i], string.match(all[i + 1], '^(%S+) (%S+)$')
  ends = tonumber(ends)
  if whose == id and overlap and digest ~= record.hash and (ends == 0 or ends > now + overlap) then
    ends = now + overlap
    redis.call('HSET', hashes, digest, string.format('%s %.6f', id, ends))
  end
  if (ends ~= 0 and ends <= now) or (whose == id and revoked) then
    redis.call('HDEL', hashes, digest)
  end
end
if not revoked then
  redis.call('HSET', hashes, record.hash, id .. ' 0')
end
return 'done'
