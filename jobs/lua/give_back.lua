-- give_back(job, token): running -> queued at the front of its lane, attempts unchanged (or canceled if asked).
-- Guards: only the current token; a draining node costs the job neither an attempt nor its key's turn.
local job = load(ARGV[2])
local refused = refuse(job, ARGV[3], 'give_back')
if refused then
  return refused
end
if job.cancel_requested == '1' then
  conclude(job, 'canceled', {closed = ARGV[3] .. ':give_back'})
else
  refund_turn(job)
  requeue(job, {closed = ARGV[3] .. ':give_back'})
end
return reply(job)
