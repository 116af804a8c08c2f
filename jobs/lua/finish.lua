-- finish(job, token, result): running -> succeeded. The one place where a result is committed.
-- Guards: a stale owner's result is refused (at most one result per job); a cancel that came too late loses;
-- state, lease, event and webhook change together or not at all.
local job = load(ARGV[2])
local refused = refuse(job, ARGV[3], 'finish')
if refused then
  return refused
end
conclude(job, 'succeeded', {result = ARGV[4], progress = '1', closed = ARGV[3] .. ':finish'})
return reply(job)
