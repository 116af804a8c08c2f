-- cancel(job): queued -> canceled at once; running -> cancel_requested, which the owner's next heartbeat returns.
-- Guards: a job that has ended stays as it is.
local job = load(ARGV[2])
if not job then
  return {'missing'}
end
if job.state == 'queued' then
  conclude(job, 'canceled', {})
elseif job.state == 'running' then
  if job.cancel_requested ~= '1' then
    save(job, {cancel_requested = '1'})
    emit(job, 'cancel_requested')
  end
else
  return {'illegal', job.state}
end
return reply(job)
