-- submit(record, body, idempotency, body_hash, max_outstanding, max_queued, deadline_seconds): nil -> queued.
-- Guards: one job per idempotency key (same body) even when two requests race; the key's and the queue's limits,
-- counted in the same step; a re-sent script finds its own job by id and changes nothing.
local job, body, idem = cjson.decode(ARGV[2]), ARGV[3], ARGV[4]
local own = load(job.id)
if own then
  return reply(own)
end
local idem_key = P .. 'idem:' .. job.key_id .. ':' .. idem
if idem ~= '' then
  local before = redis.call('HMGET', idem_key, 'hash', 'job')
  local first = before[2] and load(before[2])
  if first then
    if before[1] ~= ARGV[5] then
      return {'conflict', first.id}
    end
    local answer = reply(first)
    answer[1] = 'replayed'
    return answer
  end
end
local mine = P .. 'list:' .. job.key_id .. ':s:'
if redis.call('ZCARD', mine .. 'queued') + redis.call('ZCARD', mine .. 'running') >= tonumber(ARGV[6]) then
  return {'full', ARGV[6], 'this API key'}
end
if redis.call('ZCARD', P .. 'list:*:s:queued') >= tonumber(ARGV[7]) then
  return {'full', ARGV[7], 'the queue'}
end
job.created_at = seconds(now)
job.queued_at = job.created_at
if ARGV[8] ~= '' then
  job.deadline_at = seconds(now + tonumber(ARGV[8]))
  redis.call('ZADD', P .. 'deadlines', job.deadline_at, job.id)
end
job.state, job.version = 'queued', '0'
save(job, job)
redis.call('SET', P .. 'body:' .. job.id, body)
if idem ~= '' then
  redis.call('HSET', idem_key, 'hash', ARGV[5], 'job', job.id)
  redis.call('EXPIRE', idem_key, conf.idempotency_seconds)
end
index_add(job)
use_image(job, 1)
enqueue(job)
return reply(job)
