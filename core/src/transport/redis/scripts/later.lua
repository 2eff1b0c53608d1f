-- Stores an event that is delayed or expires, by the server's clock.
-- KEYS events delayed delayed:data meta bell
-- ARGV delay ms, or "" | expires in ms, or "" | type | event | partition key, or ""
-- Returns {the entry's id, or "" while it is delayed, when it is due}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expires = ARGV[2] ~= '' and string.format('%.0f', now + ARGV[2]) or ''
if ARGV[1] ~= '' then
  local due = now + ARGV[1]
  local number = redis.call('HINCRBY', KEYS[4], 'delayed', 1)
  local id = string.format('%014.0f-%014.0f', due, number) -- equal times keep the order of publishing
  redis.call('HSET', KEYS[3], id, cmsgpack.pack({ ARGV[3], ARGV[4], ARGV[5], expires }))
  redis.call('ZADD', KEYS[2], due, id)
  redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'why', 'delayed')
  return { '', due }
end
local entry = { 'XADD', KEYS[1], '*', 't', ARGV[3], 'e', ARGV[4] }
if ARGV[5] ~= '' then entry[#entry + 1] = 'k'; entry[#entry + 1] = ARGV[5] end
if expires ~= '' then entry[#entry + 1] = 'x'; entry[#entry + 1] = expires end
return { redis.call(unpack(entry)), 0 }
