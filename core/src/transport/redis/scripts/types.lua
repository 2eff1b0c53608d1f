-- Counts the types of a part of the log, so that the caller can apply a pattern without reading the events.
-- KEYS events
-- ARGV after this id | up to this id, or "+" | most entries
-- Returns {last id looked at, or "" at the end, then for each type: type, count, milliseconds of the first}
local counts, first, order = {}, {}, {}
local entries = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], ARGV[2], 'COUNT', ARGV[3])
local last = ''
for n, entry in ipairs(entries) do
  local kind = ''
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 't' then kind = entry[2][i + 1] end
  end
  if not counts[kind] then
    counts[kind], first[kind] = 0, tonumber(string.match(entry[1], '^(%d+)'))
    order[#order + 1] = kind
  end
  counts[kind] = counts[kind] + 1
  if n == tonumber(ARGV[3]) then last = entry[1] end
end
local out = { last }
for _, kind in ipairs(order) do
  out[#out + 1] = kind
  out[#out + 1] = counts[kind]
  out[#out + 1] = first[kind]
end
return out
