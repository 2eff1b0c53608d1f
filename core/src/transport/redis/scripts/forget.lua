-- Removes consumers that hold nothing: this one, and those that gave no sign of life for long. One that holds entries
-- is never removed, because the server would drop them.
-- KEYS events
-- ARGV group | consumer, or "" | idle ms
local rows = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if rows.err then return 0 end
local removed = 0
for _, row in ipairs(rows) do
  local facts = {}
  for i = 1, #row, 2 do facts[row[i]] = row[i + 1] end
  if facts['pending'] == 0 and (facts['name'] == ARGV[2] or facts['idle'] > tonumber(ARGV[3])) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], facts['name'])
    removed = removed + 1
  end
end
return removed
