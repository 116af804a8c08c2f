-- cancel(job, nonce): queued -> canceled at once; running -> cancel_requested, which the next heartbeat returns.
-- Guards: a job that has ended stays as it is; a cancel sent again because its reply was lost gets the first answer.
local before = repeated(ARGV[3])
if before then
  return before
end
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
return remember(ARGV[3], reply(job))
