-- Prelude 1 of 4: clock, records, replies. Joined in front of every job script; see jobs/scripts.py for the keys.
-- ARGV[1] is always the settings as JSON; a script's own arguments start at ARGV[2].
local P = 'reel:'
local conf = cjson.decode(ARGV[1])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

-- The same table as jobs/job.py TRANSITIONS; a test compares the two.
local LEGAL = {
  queued = {running = true, canceled = true, expired = true, failed = true},
  running = {queued = true, succeeded = true, failed = true, canceled = true},
  succeeded = {},
  failed = {queued = true},
  canceled = {},
  expired = {},
}

-- Times as text: Lua's own tostring keeps 14 digits, which would cut microseconds off.
local function seconds(x)
  return string.format('%.6f', x)
end

local function load(id)
  local flat = redis.call('HGETALL', P .. 'job:' .. id)
  if #flat == 0 then
    return nil
  end
  local job = {}
  for i = 1, #flat, 2 do
    job[flat[i]] = flat[i + 1]
  end
  return job
end

-- Every write passes here, so `version` (the ETag) rises with each.
local function save(job, fields)
  fields.version = tostring(job.version + 1)
  local flat = {}
  for name, value in pairs(fields) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
    job[name] = value
  end
  redis.call('HSET', P .. 'job:' .. job.id, unpack(flat))
end

-- The record as one JSON text: a client parses that several times faster than 60 short strings.
local function reply(job)
  return {'ok', cjson.encode(job), redis.call('GET', P .. 'body:' .. job.id)}
end

-- What an operation answered that is sent again because its reply was lost; nil for a new one. `nonce` is of one call
-- and its repeats: whoever asks for the same thing once more is told that it is too late.
local function repeated(nonce)
  local answer = redis.call('GET', P .. 'operation:' .. nonce)
  return answer and cjson.decode(answer) or nil
end

-- The answer itself, for a delete leaves no record. A client gives up far sooner than a minute.
local function remember(nonce, answer)
  redis.call('SET', P .. 'operation:' .. nonce, cjson.encode(answer), 'EX', 60)
  return answer
end

-- Listing indexes: ids sort by creation, so the cursor is the last id seen. Model and ref only per key.
local function indexes(job)
  local own, all = P .. 'list:' .. job.key_id .. ':', P .. 'list:*:'
  local names = {own .. 'all', all .. 'all', own .. 'm:' .. job.model}
  if job.ref ~= '' then
    names[#names + 1] = own .. 'r:' .. redis.sha1hex(job.ref)
  end
  return names, {own .. 's:', all .. 's:'}
end

local function index_add(job)
  local names, states = indexes(job)
  for _, name in ipairs(names) do
    redis.call('ZADD', name, 0, job.id)
  end
  for _, prefix in ipairs(states) do
    redis.call('ZADD', prefix .. job.state, 0, job.id)
  end
end

local function index_remove(job)
  local names, states = indexes(job)
  for _, name in ipairs(names) do
    redis.call('ZREM', name, job.id)
  end
  for _, prefix in ipairs(states) do
    redis.call('ZREM', prefix .. job.state, job.id)
  end
end

-- The only place that changes `state`. An illegal move is a bug in a script: it aborts before any write.
local function move(job, state, fields)
  if not LEGAL[job.state][state] then
    error('illegal transition ' .. job.state .. ' to ' .. state .. ' of job ' .. job.id)
  end
  local _, states = indexes(job)
  for _, prefix in ipairs(states) do
    redis.call('ZREM', prefix .. job.state, job.id)
    redis.call('ZADD', prefix .. state, 0, job.id)
  end
  fields.state = state
  save(job, fields)
end

-- Whether the caller still owns the attempt. nil: yes. Otherwise the reply to return at once.
-- `operation` is remembered in `closed` when an attempt ends, so a script that is sent again because its reply
-- was lost answers as the first time and writes nothing.
local function refuse(job, token, operation)
  if not job then
    return {'lost', 'the job is gone'}
  end
  if operation ~= '' and job.closed == token .. ':' .. operation then
    return reply(job)
  end
  if job.token ~= token then
    return {'lost', 'the job is at token ' .. job.token}
  end
  if job.state ~= 'running' then
    return {'lost', 'the job is ' .. job.state}
  end
  return nil
end
