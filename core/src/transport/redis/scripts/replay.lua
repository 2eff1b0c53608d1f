-- Gives dead letters back to their group, attempts from 1, and removes the records, each in one step.
-- KEYS dead retry work groups bell
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
      redis.call('ZADD', KEYS[2], 0, id)
      redis.call('XDEL', KEYS[1], ARGV[at])
      count = count + 1
    end
  end
end
if count > 0 then redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'why', 'replay') end
return count
