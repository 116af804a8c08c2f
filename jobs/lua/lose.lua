-- lose(job, model): running with an expired lease -> queued, failed (+ dead letter) or canceled; attempt charged.
-- Guards: checked again here, so two sweeps, or a sweep and a claim, charge one lost lease once.
local job = load(ARGV[2])
if not job or job.state ~= 'running' then
  redis.call('ZREM', P .. 'leases:' .. ARGV[3], ARGV[2])
  return {'none'}
end
if tonumber(job.lease_until) > now then
  return {'none'}
end
lose(job)
return reply(job)
