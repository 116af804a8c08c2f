-- uploads_due(limit): input images whose time is over. Guards: one that a live job uses is put off by an hour.
local due = {}
for _, key in ipairs(redis.call('ZRANGEBYSCORE', P .. 'uploads', '-inf', seconds(now), 'LIMIT', 0, ARGV[2])) do
  if redis.call('HEXISTS', P .. 'uploads:users', key) == 1 then
    redis.call('ZADD', P .. 'uploads', seconds(now + 3600), key)
  else
    due[#due + 1] = key
  end
end
return due
