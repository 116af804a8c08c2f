-- fail(job, token, class, problem): running -> queued (tries left), failed (+ dead letter), or canceled if asked.
-- Guards: only the current token; attempts counted once per attempt; user errors are never retried.
local job = load(ARGV[2])
local refused = refuse(job, ARGV[3], 'fail')
if refused then
  return refused
end
charge(job, ARGV[4], ARGV[5], ARGV[3] .. ':fail')
return reply(job)
