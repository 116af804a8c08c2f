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

-- A chain is what one receiver hears: the deliveries of one job to its callback (the job's id) or to one endpoint of
-- its key (job id:endpoint id). Only a chain's oldest unfinished delivery is in the outbox: that keeps them in order,
-- and a receiver that is down holds up nobody else's.
local function outbox_head(chain, due)
  local head = redis.call('LINDEX', P .. 'pending:' .. chain, 0)
  while head and redis.call('EXISTS', P .. 'delivery:' .. head) == 0 do -- it expired
    redis.call('LPOP', P .. 'pending:' .. chain)
    head = redis.call('LINDEX', P .. 'pending:' .. chain, 0)
  end
  if head then
    redis.call('ZADD', P .. 'outbox', seconds(due), head)
    redis.call('HSET', P .. 'delivery:' .. head, 'next_at', seconds(due))
  end
end

-- Write one delivery down. to: url, endpoint (or ''), chain, log (its list of deliveries).
local function post(id, job_id, key_id, to, event, data)
  local pending = P .. 'pending:' .. to.chain
  local head = redis.call('LINDEX', pending, 0)
  if head and redis.call('EXISTS', P .. 'delivery:' .. head) == 0 then
    outbox_head(to.chain, now) -- it expired, and no sender has seen it: else nothing behind it were ever sent
  end
  local gone = redis.call('EXISTS', P .. 'gone:' .. redis.sha1hex(to.url)) == 1
  redis.call('HSET', P .. 'delivery:' .. id, 'id', id, 'job_id', job_id, 'key_id', key_id,
    'event', event, 'url', to.url, 'endpoint', to.endpoint, 'chain', to.chain, 'data', data, 'created_at', seconds(now),
    'state', gone and 'dead' or 'pending', 'attempts', '0', 'attempt', '0', 'lease_until', '', 'next_at', '',
    'status', '', 'error', gone and 'the endpoint answered 410 Gone before' or '', 'ended_at', gone and seconds(now) or '')
  if to.endpoint ~= '' then
    local log = P .. 'deliveries:' .. to.endpoint
    redis.call('RPUSH', log, id)
    redis.call('LTRIM', log, -conf.endpoint_log, -1)
    redis.call('EXPIRE', log, 2 * conf.delivery_seconds)
  end
  if gone then
    redis.call('ZADD', P .. 'outbox:dead', seconds(now), id)
  elseif redis.call('RPUSH', pending, id) == 1 then
    outbox_head(to.chain, now)
  end
end

-- Who wants to hear of `event`: the job's own callback, and the endpoints of its key.
local function receivers(job, event)
  local found, body = {}, cjson.decode(redis.call('GET', P .. 'body:' .. job.id))
  if string.find(',' .. job.hooks .. ',', ',' .. event .. ',', 1, true) then
    found[1] = {url = body.callback_url, endpoint = '', chain = job.id}
  end
  for _, text in ipairs(redis.call('HVALS', P .. 'endpoints:' .. job.key_id)) do
    local endpoint = cjson.decode(text)
    for _, wanted in ipairs(endpoint.enabled and endpoint.events or {}) do
      if wanted == 'job.' .. event then
        found[#found + 1] = {url = endpoint.url, endpoint = endpoint.id, chain = job.id .. ':' .. endpoint.id}
      end
    end
  end
  return found, body
end

local function deliver(job, event, data)
  if job.hooks == '' and redis.call('EXISTS', P .. 'endpoints:' .. job.key_id) == 0 then
    return -- most jobs: nobody listens
  end
  local found, body = receivers(job, event)
  for _, to in ipairs(found) do
    local last = event == 'progress' and redis.call('LINDEX', P .. 'pending:' .. to.chain, -1)
    -- a receiver that is behind: one waiting progress report is enough
    if not last or redis.call('HGET', P .. 'delivery:' .. last, 'event') ~= 'job.progress' then
      local number = redis.call('HINCRBY', P .. 'job:' .. job.id, 'deliveries', 1)
      local id = 'msg_' .. string.gsub(job.id, '^job_', '') .. '_' .. number
      redis.call('RPUSH', P .. 'deliveries:' .. job.id, id)
      post(id, job.id, job.key_id, to, 'job.' .. event,
        string.sub(data, 1, -2) .. ',"metadata":' .. cjson.encode(body.metadata) .. '}')
    end
  end
end

-- The chain of a delivery, from its HMGET'd fields: records of earlier versions have none.
local function chain_of(chain, job_id)
  return chain and chain ~= '' and chain or job_id
end

-- Every chain of a job that may still hold something.
local function chains(job)
  local found = {[job.id] = true}
  for _, id in ipairs(redis.call('LRANGE', P .. 'deliveries:' .. job.id, 0, -1)) do
    local chain = redis.call('HGET', P .. 'delivery:' .. id, 'chain')
    found[chain_of(chain, job.id)] = true
  end
  return found
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
