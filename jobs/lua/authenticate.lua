-- authenticate(hash): the API key's record, or nothing when unknown, revoked or rotated out. Read only.
local entry = redis.call('HGET', P .. 'apikeys:hashes', ARGV[2])
if not entry then
  return false
end
local id, valid_until = string.match(entry, '^(%S+) (%S+)$')
if tonumber(valid_until) ~= 0 and tonumber(valid_until) <= now then
  return false
end
return redis.call('HGET', P .. 'apikeys', id)
