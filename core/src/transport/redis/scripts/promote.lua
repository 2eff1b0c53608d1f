#!lua flags=allow-oom
-- Moves delayed events that are due into the log, oldest first.
-- KEYS events delayed delayed:data
-- ARGV most events
-- Returns {now, next due (-1: none)}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local data = redis.call('HGET', KEYS[3], id)
  if data then
    local kind, event, key, expires = unpack(cmsgpack.unpack(data))
    local entry = { 'XADD', KEYS[1], '*', 't', kind, 'e', event }
    if key ~= '' then entry[#entry + 1] = 'k'; entry[#entry + 1] = key end
    if expires ~= '' then entry[#entry + 1] = 'x'; entry[#entry + 1] = expires end
    redis.call(unpack(entry))
  end
  redis.call('ZREM', KEYS[2], id)
  redis.call('HDEL', KEYS[3], id)
end
local found = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return { now, found[2] and math.ceil(tonumber(found[2])) or -1 }
