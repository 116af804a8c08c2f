-- position(job): how many waiting jobs are likely to start before this one; -1 when it does not wait. Read only.
-- Exact within a lane and across levels that nobody aged into; across lanes of one level it assumes equal shares.
local job = load(ARGV[2])
if not job then
  return -2
end
local level = LEVELS[job.priority]
local lane = lane_key(job.model, level, job.key_id)
local rank = redis.call('ZRANK', lane, job.id)
if job.state ~= 'queued' or not rank then
  return -1
end
local lanes = P .. 'lanes:' .. job.model
local score = tonumber(redis.call('ZSCORE', lanes, level .. ':' .. job.key_id))
local effective = math.floor(score / SPAN)
local from, to = effective * SPAN, (effective + 1) * SPAN - 1
local peers = redis.call('ZCOUNT', lanes, string.format('%.0f', from), string.format('%.0f', to))
local before = redis.call('ZRANK', lanes, level .. ':' .. job.key_id)
  - redis.call('ZCOUNT', lanes, '-inf', '(' .. string.format('%.0f', from))
local waiting = redis.call('HMGET', P .. 'waiting:' .. job.model, 0, 1, 2)
local better = 0
for above = 0, math.min(effective, level) - 1 do
  better = better + tonumber(waiting[above + 1] or 0)
end
local behind = redis.call('ZCARD', lane) - rank -- this job and those after it in its own lane
local competing = 0 -- jobs at this lane's level, and at the levels that it rose through
for near = math.min(effective, level), level do
  competing = competing + tonumber(waiting[near + 1] or 0)
end
return better + math.min(rank * peers + before, math.max(rank, competing - behind))
