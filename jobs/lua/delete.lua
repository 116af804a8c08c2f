-- delete(job): a terminal job's record goes at once; its files are named in `garbage` until somebody removes them.
-- Guards: a live job can't be deleted under its node.
local job = load(ARGV[2])
if not job then
  return {'missing'}
end
if job.state == 'queued' or job.state == 'running' then
  return {'illegal', job.state}
end
local answer = reply(job)
erase(job)
return answer
