-- Prelude 3 of 4: what the outside hears. Events (a capped stream per job) and webhook deliveries (the outbox) are
-- written by the script that makes the change, so neither can be missing or be there without it.

local function raw(text)
  if text == nil or text == '' then
    return 'null'
  end
  return text
end

local function quoted(text)
  if text == nil or text == '' then
    return 'null'
  end
  return cjson.encode(text)
end

-- The public state of a job as JSON; spliced, because cjson would cut numbers to 14 digits.
local function snapshot(job, reason)
  return '{"id":' .. cjson.encode(job.id) .. ',"state":"' .. job.state .. '","model":' .. cjson.encode(job.model)
    .. ',"attempts":' .. job.attempts .. ',"phase":' .. quoted(job.phase) .. ',"step":' .. job.step
    .. ',"progress":' .. job.progress .. ',"eta_seconds":' .. raw(job.eta_seconds)
    .. ',"cancel_requested":' .. (job.cancel_requested == '1' and 'true' or 'false')
    .. ',"version":' .. job.version .. ',"error":' .. raw(job.error) .. ',"reason":' .. raw(reason) .. '}'
end

-- Only the oldest unfinished delivery of a job is in the outbox: that is what keeps them in order.
local function outbox_head(job_id, due)
  local head = redis.call('LINDEX', P .. 'pending:' .. job_id, 0)
  if head and redis.call('EXISTS', P .. 'delivery:' .. head) == 1 then
    redis.call('ZADD', P .. 'outbox', seconds(due), head)
    redis.call('HSET', P .. 'delivery:' .. head, 'next_at', seconds(due))
  end
end

local function deliver(job, event, data)
  if not string.find(',' .. job.hooks .. ',', ',' .. event .. ',', 1, true) then
    return
  end
  local pending = P .. 'pending:' .. job.id
  if event == 'progress' then
    local last = redis.call('LINDEX', pending, -1)
    if last and redis.call('HGET', P .. 'delivery:' .. last, 'event') == 'job.progress' then
      return -- the receiver is behind: one waiting progress report is enough
    end
  end
  local body = cjson.decode(redis.call('GET', P .. 'body:' .. job.id))
  local number = redis.call('HINCRBY', P .. 'job:' .. job.id, 'deliveries', 1)
  local id = 'msg_' .. string.gsub(job.id, '^job_', '') .. '_' .. number
  local gone = redis.call('EXISTS', P .. 'gone:' .. redis.sha1hex(body.callback_url)) == 1
  data = string.sub(data, 1, -2) .. ',"metadata":' .. cjson.encode(body.metadata) .. '}'
  redis.call('HSET', P .. 'delivery:' .. id, 'id', id, 'job_id', job.id, 'key_id', job.key_id,
    'event', 'job.' .. event, 'url', body.callback_url, 'data', data, 'created_at', seconds(now),
    'state', gone and 'dead' or 'pending', 'attempts', '0', 'attempt', '0', 'lease_until', '', 'next_at', '',
    'status', '', 'error', gone and 'the endpoint answered 410 Gone before' or '', 'ended_at', gone and seconds(now) or '')
  redis.call('RPUSH', P .. 'deliveries:' .. job.id, id)
  if gone then
    redis.call('ZADD', P .. 'outbox:dead', seconds(now), id)
  elseif redis.call('RPUSH', pending, id) == 1 then
    outbox_head(job.id, now)
  end
end

-- A waiting job has no stream yet: Redis sets 4 KB aside for each, too much for 200,000 of them. Readers make up
-- job.queued from the record (events.py), and the first real event writes it down under the same id.
local function append(job, event, data)
  local stream = P .. 'events:' .. job.id
  if redis.call('EXISTS', stream) == 0 then
    local first = {id = job.id, state = 'queued', model = job.model, attempts = '0', step = '0', progress = '0', version = '1'}
    local at = string.gsub(job.created_at, '^(%d+)%.(%d%d%d).*', '%1%2-0') -- milliseconds
    redis.call('XADD', stream, at, 'type', 'job.queued', 'data', snapshot(first))
  end
  redis.call('XADD', stream, 'MAXLEN', '~', conf.events_cap, '*', 'type', 'job.' .. event, 'data', data)
end

local function emit(job, event, reason)
  local data = snapshot(job, reason)
  append(job, event, data)
  deliver(job, event, data)
end
