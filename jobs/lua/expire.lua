-- expire(job): queued -> expired, when its deadline passed before its first start.
-- Guards: checked again here, so a sweep that read an old list can't expire a job that has started since.
local job = load(ARGV[2])
if not job or job.state ~= 'queued' or not overdue(job) then
  if not job or job.state ~= 'queued' then
    redis.call('ZREM', P .. 'deadlines', ARGV[2])
  end
  return {'none'}
end
conclude(job, 'expired', {})
return reply(job)
