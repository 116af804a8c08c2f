-- cancel_running(job, token): running -> canceled, confirmed by the owner after it stopped.
-- Guards: only the current token, and only if a cancel was asked for.
local job = load(ARGV[2])
local refused = refuse(job, ARGV[3], 'cancel')
if refused then
  return refused
end
if job.cancel_requested ~= '1' then
  return {'illegal', job.state}
end
conclude(job, 'canceled', {closed = ARGV[3] .. ':cancel'})
return reply(job)
