-- Takes work of an ordered group: what waits and is due, then new entries of the log. Reading and finding the lane are one
-- step, so that an event cannot overtake another of its key between two processes. Every entry read is copied into the
-- group's store of work; one whose lane has an active event is parked behind it.
-- KEYS events groups counts retry held work lanes
-- ARGV group | consumer | token prefix | lease ms | most deliveries | most bytes | 1 to take what has expired, too, or "" | pattern |
-- types that it does not match …
-- Returns {now, next due (-1: none), lost, 1 when the log may have more, up to this entry all was read, pattern, then for
-- each: id, event, attempt, first failed, token, type, codec, 1 when somebody took it before, 1 when it has
-- expired}. With another pattern than the caller's nothing was done.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local group, most, bytes, keep = ARGV[1], tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7] == '1'
local retry, held, work, lanes = KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local known = redis.call('HGET', KEYS[2], group)
if not known then return redis.error_reply('NOGROUP the group is not known on this bus') end
local pattern = cjson.decode(known).pattern
local out, taken, size, expired = { now, -1, 0, 1, '', pattern }, 0, 0, 0
if pattern ~= ARGV[8] then return out end

local function lease(id, event, attempt, failed, from, kind, codec, again, late)
  taken, size = taken + 1, size + #event
  local token = ARGV[3] .. taken
  redis.call('ZADD', held, now + ARGV[4], id)
  redis.call('HSET', work, id .. ':facts', attempt .. '|' .. failed .. '|' .. token .. '|' .. from)
  for _, part in ipairs({ id, event, attempt, failed, token, kind, codec, again, late and 1 or 0 }) do out[#out + 1] = part end
end

-- What dead owners held comes back first; their attempts count.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', held, '-inf', now, 'LIMIT', 0, 500)) do
  redis.call('ZADD', retry, 0, id)
  redis.call('ZREM', held, id)
end

local looked = 0
while taken < most and size < bytes and looked < 1000 do
  local id = redis.call('ZRANGEBYSCORE', retry, '-inf', now, 'LIMIT', 0, 1)[1]
  if not id then break end
  looked = looked + 1
  redis.call('ZREM', retry, id)
  local event, facts, lane = unpack(redis.call('HMGET', work, id, id .. ':facts', id .. ':lane'))
  local attempt, failed, mark, from = string.match(facts or '', '^(%d+)|([^|]*)|([^|]*)|(.*)$')
  -- It may have expired in its lane, or before its next attempt. When it is new, nobody has matched its type yet.
  local expires, codec, kind = string.match(lane or '', '^[^|]*|[^|]*|([^|]*)|([^|]*)|(.*)$')
  expires = tonumber(expires or string.match(from or '', '|(%d+)$') or '')
  local late = expires and expires <= now
  if event and attempt and (keep or not late) then
    lease(id, event, attempt + 1, failed, from, mark == 'new' and kind or '', codec or '', mark == 'new' and 0 or 1, late)
  else
    redis.call('HDEL', work, id, id .. ':facts')
    proceed(retry, work, lanes, id)
    if late then expired = expired + 1 else out[3] = out[3] + 1 end
  end
end

local unwanted = {}
for at = 9, #ARGV do unwanted[ARGV[at]] = true end
local read = 0
while taken < most and size < bytes and read < 1000 do
  local answer = redis.call('XREADGROUP', 'GROUP', group, ARGV[2], 'COUNT', most - taken, 'NOACK', 'STREAMS', KEYS[1], '>')
  if not answer then
    out[4] = 0
    local stream = redis.call('XINFO', 'STREAM', KEYS[1])
    for i = 1, #stream, 2 do
      if stream[i] == 'last-generated-id' then out[5] = stream[i + 1] end
    end
    break
  end
  for _, entry in ipairs(answer[1][2]) do
    local id, fields = entry[1], {}
    read, out[5] = read + 1, entry[1]
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    local late = fields.x and tonumber(fields.x) <= now
    if fields.t and unwanted[fields.t] then -- nothing to do
    elseif late and not keep then
      expired = expired + 1
    else
      local event, codec, key = fields.e, fields.c or '', fields.k
      if not event then -- whatever is there stands for it in the dead letter
        event = ''
        for i = 1, #entry[2], 2 do event = event .. entry[2][i] .. '=' .. entry[2][i + 1] .. '\n' end
      end
      redis.call('HSET', work, id, event)
      local active = true
      if key and key ~= '' then
        local digest, place = redis.sha1hex(key), place_of(id)
        redis.call('HSET', work, id .. ':lane', digest .. '|' .. place .. '|' .. (fields.x or '') .. '|'
          .. codec .. '|' .. (fields.t or ''))
        active = redis.call('HSETNX', work, 'lane:' .. digest, id) == 1
        if not active then
          redis.call('HSET', work, id .. ':facts', '0||new|')
          redis.call('ZADD', lanes, 0, digest .. ':' .. place .. ':' .. id)
        end
      end
      if active then
        -- Without a key, nothing but its facts can tell when it expires.
        local from = fields.x and not (key and key ~= '') and '|' .. fields.x or ''
        lease(id, event, 1, '', from, fields.t or '', codec, 0, late)
      end
    end
  end
end

if expired > 0 then redis.call('HINCRBY', KEYS[3], group .. ':expired', expired) end
for _, key in ipairs({ retry, held }) do
  local found = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  local at = found[2] and math.ceil(tonumber(found[2]))
  if at and (out[2] < 0 or at < out[2]) then out[2] = at end
end
return out
