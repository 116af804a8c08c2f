-- stats(): [model, level, waiting, running, oldest queued_at] rows. Read only; looks at 1,000 lanes a model at most.
local rows = {}
for _, model in ipairs(redis.call('SMEMBERS', P .. 'queues')) do
  local waiting = redis.call('HMGET', P .. 'waiting:' .. model, 0, 1, 2)
  local running = redis.call('HMGET', P .. 'running:' .. model, 0, 1, 2)
  local oldest = {}
  for _, lane in ipairs(redis.call('ZRANGE', P .. 'lanes:' .. model, 0, 999)) do
    local level = tonumber(string.sub(lane, 1, 1))
    local head = redis.call('ZRANGE', lane_key(model, level, string.sub(lane, 3)), 0, 0, 'WITHSCORES')
    if head[2] and (not oldest[level] or tonumber(head[2]) < tonumber(oldest[level])) then
      oldest[level] = head[2]
    end
  end
  for level = 0, 2 do
    local age = oldest[level] and seconds(now - tonumber(oldest[level])) or ''
    rows[#rows + 1] = {model, level, waiting[level + 1] or '0', running[level + 1] or '0', age}
  end
end
return rows
