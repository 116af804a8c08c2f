-- replay(job, nonce): failed -> queued, by an operator, with its attempts reset and at the back of its lane.
-- Guards: only a job of the dead letter (a user error would only fail again); the token goes on rising; a repeat
-- (same nonce) gets the first answer and queues nothing.
local before = repeated(ARGV[3])
if before then
  return before
end
local job = load(ARGV[2])
if not job then
  return {'missing'}
end
if job.state ~= 'failed' or not redis.call('ZSCORE', P .. 'dead', job.id) then
  return {'illegal', job.state}
end
redis.call('ZREM', P .. 'dead', job.id)
redis.call('ZREM', P .. 'retention', job.id)
move(job, 'queued', {
  attempts = '0', memory_failures = '0', error = '', finished_at = '', owner = '', closed = '', step = '0',
  progress = '0', queued_at = seconds(now), deadline_at = '', cancel_requested = '0',
})
use_image(job, 1)
enqueue(job)
emit(job, 'queued')
return remember(ARGV[3], reply(job))
