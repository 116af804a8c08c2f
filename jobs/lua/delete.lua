-- delete(job, nonce): a terminal job's record goes at once; its files are named in `garbage` until they are removed.
-- Guards: a live job can't be deleted under its node; a repeat (same nonce) gets the first answer.
local before = repeated(ARGV[3])
if before then
  return before
end
local job = load(ARGV[2])
if not job then
  return {'missing'}
end
if job.state == 'queued' or job.state == 'running' then
  return {'illegal', job.state}
end
local answer = reply(job)
erase(job)
return remember(ARGV[3], answer)
