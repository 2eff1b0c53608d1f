-- The ids and types of a part of the log, so that the caller can apply a pattern without reading the events.
-- KEYS events
-- ARGV from | to | most entries
-- Returns for each: id, type
local out = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[2], 'COUNT', ARGV[3])) do
  local kind = ''
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 't' then kind = entry[2][i + 1] end
  end
  out[#out + 1] = entry[1]
  out[#out + 1] = kind
end
return out
