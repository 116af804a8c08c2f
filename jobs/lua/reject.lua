-- reject(job, problem, nonce): queued -> failed, by an operator, for a job that no node will ever take.
-- Guards: only a waiting job; the dead letter keeps it for a replay; a repeat (same nonce) gets the first answer.
local before = repeated(ARGV[4])
if before then
  return before
end
local job = load(ARGV[2])
if not job then
  return {'missing'}
end
if job.state ~= 'queued' then
  return {'illegal', job.state}
end
conclude(job, 'failed', {error = ARGV[3]})
redis.call('ZADD', P .. 'dead', seconds(now), job.id)
return remember(ARGV[4], reply(job))
