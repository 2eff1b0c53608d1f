-- The lanes of an ordered group, one for each partition key; in front of the scripts that need them. Of a lane one event is
-- active: leased, or waiting in `retry`. The others are parked in the sorted set `lanes`, all with score 0 and so in the
-- order of their texts: '<digest of the key>:<place>:<id>'. In the hash `work` are, beside event and facts,
--   '<id>:lane' = '<digest>|<place>|<expires>|<codec>|<type>'   of every event with a key
--   'lane:<digest>' = the id of the active event
-- The facts of an event that nobody took yet have the token 'new'. A place is the entry's id, padded so that texts sort as numbers do.
local function place_of(id)
  local ms, number = string.match(id, '^(%d+)%-(%d+)$')
  return string.rep('0', 15 - #ms) .. ms .. '-' .. string.rep('0', 20 - #number) .. number
end

-- The event `id` is gone, whatever the reason: the first parked one of its lane becomes due. How many did: 1 or 0.
local function proceed(retry, work, lanes, id)
  local lane = redis.call('HGET', work, id .. ':lane')
  if not lane then return 0 end
  redis.call('HDEL', work, id .. ':lane')
  local digest = string.match(lane, '^[^|]*')
  if redis.call('HGET', work, 'lane:' .. digest) ~= id then return 0 end
  while true do
    local first = redis.call('ZRANGE', lanes, '[' .. digest .. ':', '(' .. digest .. ';', 'BYLEX', 'LIMIT', 0, 1)[1]
    if not first then
      redis.call('HDEL', work, 'lane:' .. digest)
      return 0
    end
    redis.call('ZREM', lanes, first)
    local next = string.match(first, '^[^:]*:[^:]*:(.*)$')
    if redis.call('HEXISTS', work, next) == 1 then -- else somebody removed it by hand, or an older polybus the group
      redis.call('HSET', work, 'lane:' .. digest, next)
      redis.call('ZADD', retry, 0, next)
      return 1
    end
  end
end
