-- Looks at a partition without changing it: time, end of the log, what is due next, whether groups changed.
-- KEYS events delayed meta | then for each group: retry held
-- Returns {now, last id, next delayed (-1: none), epoch, version, next of each group (-1: none) …}
local time = redis.call('TIME')
local function first(key)
  local found = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return found[2] and math.ceil(tonumber(found[2])) or -1
end
local last = '0-0'
local stream = redis.pcall('XINFO', 'STREAM', KEYS[1])
for i = 1, stream.err and 0 or #stream, 2 do
  if stream[i] == 'last-generated-id' then last = stream[i + 1] end
end
local out = {
  time[1] * 1000 + math.floor(time[2] / 1000),
  last,
  first(KEYS[2]),
  redis.call('HGET', KEYS[3], 'epoch') or '',
  tonumber(redis.call('HGET', KEYS[3], 'version') or 0),
}
for i = 4, #KEYS, 2 do
  local retry, held = first(KEYS[i]), first(KEYS[i + 1])
  if retry < 0 or (held >= 0 and held < retry) then retry = held end
  out[#out + 1] = retry
end
return out
