-- Gives dead letters back to their group, attempts from 1, and removes the records, each in one step. In an
-- ordered group each takes its place in its lane: behind what is active, before what was published later.
-- KEYS dead retry work groups bell lanes
-- ARGV group | ids …
-- Returns how many. One that its group has to do already, after a replay of the log, stays.
if redis.call('HEXISTS', KEYS[4], ARGV[1]) == 0 then return 0 end
local count = 0
for at = 2, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[at], ARGV[at])[1]
  if entry then
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    -- Under the name of the log's entry, so that it is recognised there; letters of older versions do not tell it.
    local id = (fields.i or '') ~= '' and fields.i or 'dead:' .. ARGV[at]
    if redis.call('HEXISTS', KEYS[3], id .. ':facts') == 0 then
      redis.call('HSET', KEYS[3], id, fields.e, id .. ':facts', '0|||' .. ARGV[at])
      local digest, place = string.match(fields.o or '', '^(.+)|(.+)$')
      if digest then redis.call('HSET', KEYS[3], id .. ':lane', digest .. '|' .. place .. '||') end
      if not digest or redis.call('HSETNX', KEYS[3], 'lane:' .. digest, id) == 1 then
        redis.call('ZADD', KEYS[2], 0, id)
      else
        redis.call('ZADD', KEYS[6], 0, digest .. ':' .. place .. ':' .. id)
      end
      redis.call('XDEL', KEYS[1], ARGV[at])
      count = count + 1
    end
  end
end
if count > 0 then redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'why', 'replay') end
return count
