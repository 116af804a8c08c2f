-- Prelude 4 of 4: moves that several scripts share.

-- An input image stays while a live job uses it, and for the retention time after the last one's end.
local function use_image(job, change)
  if not job.image then
    return
  end
  if redis.call('HINCRBY', P .. 'uploads:users', job.image, change) <= 0 then
    redis.call('HDEL', P .. 'uploads:users', job.image)
    redis.call('ZADD', P .. 'uploads', 'XX', seconds(now + conf.retention_seconds), job.image)
  end
end

-- The next attempt's token: microseconds of the claim, and always above the last. A count would give the same
-- token twice when Redis lost a claim (a fail-over, a power cut) and the job was claimed anew.
local function next_token(job)
  return string.format('%.0f', math.max(job.token + 1, clock[1] * 1e6 + clock[2]))
end

-- A new attempt: the token rises, so every earlier owner's writes are refused from here on.
local function start(job, node)
  move(job, 'running', {
    token = next_token(job), owner = node, lease_until = seconds(now + conf.lease_seconds),
    started_at = seconds(now), phase = '', step = '0', progress = '0', eta_seconds = '', closed = '',
  })
  redis.call('ZREM', P .. 'deadlines', job.id)
  lease_take(job)
  emit(job, 'started')
end

-- Back to the front of its lane.
local function requeue(job, fields, reason)
  fields.owner, fields.lease_until, fields.phase, fields.eta_seconds = '', '', '', ''
  fields.step, fields.progress = '0', '0'
  move(job, 'queued', fields)
  lease_drop(job)
  enqueue(job)
  emit(job, 'queued', reason)
end

-- A terminal state: leaves every queue, keeps its record until retention ends.
local function conclude(job, state, fields)
  local waited = job.state == 'queued'
  fields.lease_until, fields.eta_seconds, fields.phase = '', '', ''
  fields.finished_at = seconds(now)
  move(job, state, fields)
  if waited then
    dequeue(job)
  end
  lease_drop(job)
  redis.call('ZREM', P .. 'deadlines', job.id)
  redis.call('ZADD', P .. 'retention', seconds(now + conf.retention_seconds), job.id)
  use_image(job, -1)
  emit(job, state)
end

-- A failed attempt, by its failure class: again, or failed and (unless the user's own fault) in the dead letter.
local function charge(job, class, problem, closed)
  local attempts = job.attempts + 1
  local fields = {attempts = tostring(attempts), closed = closed}
  local again = attempts < conf.max_attempts
  if class == 'user' then
    again = false
  elseif class == 'out_of_memory' then
    fields.memory_failures = tostring(tonumber(job.memory_failures or 0) + 1)
    again = again and fields.memory_failures == '1'
  end
  if job.cancel_requested == '1' then
    conclude(job, 'canceled', fields)
  elseif again then
    requeue(job, fields, problem)
  else
    fields.error = problem
    conclude(job, 'failed', fields)
    if class ~= 'user' then
      redis.call('ZADD', P .. 'dead', seconds(now), job.id)
    end
  end
end

-- The lease ran out: the node died or froze.
local function lose(job)
  local problem = cjson.encode({
    type = 'lease-lost', title = 'The node stopped answering', failure_class = 'lost',
    detail = 'node ' .. job.owner .. ' held the job and did not renew its lease in time',
  })
  charge(job, 'lost', problem, '')
end

-- A job that was never started may expire; one that was started once may not, whoever returned it.
local function overdue(job)
  return job.deadline_at ~= '' and job.started_at == '' and tonumber(job.deadline_at) <= now
end

-- Remove a job's record. Its webhook deliveries stay readable to the outbox until they expire by themselves.
local function erase(job)
  index_remove(job)
  redis.call('DEL', P .. 'job:' .. job.id, P .. 'body:' .. job.id, P .. 'events:' .. job.id)
  redis.call('ZREM', P .. 'retention', job.id)
  redis.call('ZREM', P .. 'dead', job.id)
  for chain in pairs(chains(job)) do
    redis.call('EXPIRE', P .. 'pending:' .. chain, conf.delivery_seconds)
  end
  for _, id in ipairs(redis.call('LRANGE', P .. 'deliveries:' .. job.id, 0, -1)) do
    redis.call('EXPIRE', P .. 'delivery:' .. id, conf.delivery_seconds)
    redis.call('ZREM', P .. 'outbox:dead', id)
  end
  redis.call('EXPIRE', P .. 'deliveries:' .. job.id, conf.delivery_seconds)
  redis.call('ZADD', P .. 'garbage', seconds(now), job.id)
end
