-- purge(job): a terminal job's record goes when its retention ends.
-- Guards: a replayed job is no longer due; a job with webhooks still under way waits for them.
local job = load(ARGV[2])
local due = redis.call('ZSCORE', P .. 'retention', ARGV[2])
if not job or not due then
  redis.call('ZREM', P .. 'retention', ARGV[2])
  return {'none'}
end
if tonumber(due) > now then
  return {'none'}
end
for chain in pairs(chains(job)) do
  if redis.call('EXISTS', P .. 'pending:' .. chain) == 1 then
    redis.call('ZADD', P .. 'retention', seconds(now + 60), job.id)
    return {'none'}
  end
end
erase(job)
return {'ok'}
