-- heartbeat(job, token, phase, step, progress, eta): running -> running, lease renewed.
-- Guards: only the current token renews; a client-visible change raises the version and makes an event, a mere
-- renewal does not; job.progress webhooks are throttled to one per `webhook_progress_seconds`.
local job = load(ARGV[2])
local refused = refuse(job, ARGV[3], '')
if refused then
  return refused
end
job.lease_until = seconds(now + conf.lease_seconds)
redis.call('HSET', P .. 'job:' .. job.id, 'lease_until', job.lease_until)
lease_take(job)
local moved = job.phase ~= ARGV[4] or job.step ~= ARGV[5] or job.progress ~= ARGV[6]
if moved then
  save(job, {phase = ARGV[4], step = ARGV[5], progress = ARGV[6], eta_seconds = ARGV[7]})
  local data = snapshot(job)
  append(job, 'progress', data)
  if now >= tonumber(job.progress_hook_at or 0) + conf.webhook_progress_seconds then
    redis.call('HSET', P .. 'job:' .. job.id, 'progress_hook_at', seconds(now))
    deliver(job, 'progress', data)
  end
end
return {'ok', job.cancel_requested}
