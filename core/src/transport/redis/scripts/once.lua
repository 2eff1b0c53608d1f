-- Stores an event as `later` does, or at once, unless one with its idempotency key was stored within that one's window.
-- KEYS seen events delayed delayed:data meta bell
-- ARGV window ms | id of the event | delay ms, or "" | expires in ms, or "" | type | event | partition key, or ""
-- Returns {the entry's id, or "" while it is delayed, when it is due, the id of the event that was stored before, or ""}
local seen = redis.call('GET', KEYS[1])
if seen then
  local entry, id = string.match(seen, '^([^|]*)|(.*)$')
  return { entry, 0, id }
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expires = ARGV[4] ~= '' and string.format('%.0f', now + ARGV[4]) or ''
local position, due = '', 0
if ARGV[3] ~= '' then
  due = now + ARGV[3]
  local number = redis.call('HINCRBY', KEYS[5], 'delayed', 1)
  local id = string.format('%014.0f-%014.0f', due, number)
  redis.call('HSET', KEYS[4], id, cmsgpack.pack({ ARGV[5], ARGV[6], ARGV[7], expires }))
  redis.call('ZADD', KEYS[3], due, id)
  redis.call('XADD', KEYS[6], 'MAXLEN', 1, '*', 'why', 'delayed')
else
  local entry = { 'XADD', KEYS[2], '*', 't', ARGV[5], 'e', ARGV[6] }
  if ARGV[7] ~= '' then entry[#entry + 1] = 'k'; entry[#entry + 1] = ARGV[7] end
  if expires ~= '' then entry[#entry + 1] = 'x'; entry[#entry + 1] = expires end
  position = redis.call(unpack(entry))
end
redis.call('SET', KEYS[1], position .. '|' .. ARGV[2], 'PX', ARGV[1])
return { position, due, '' }
