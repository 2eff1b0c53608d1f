-- What a group has to do with entries of the log.
-- KEYS events retry held work
-- ARGV group | ids …
-- Returns {last delivered id, then for each: how (p: pending list, h: held, r: waits for a time, w: waits for its key, or ""), attempts, first failed, due}
local out = { '0-0' }
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
for i = 1, groups.err and 0 or #groups do
  local row = {}
  for n = 1, #groups[i], 2 do row[groups[i][n]] = groups[i][n + 1] end
  if row['name'] == ARGV[1] then out[1] = row['last-delivered-id'] end
end
for at = 2, #ARGV do
  local id = ARGV[at]
  local how, attempts, failed, due = '', 0, '', 0
  local row = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  local facts = redis.call('HGET', KEYS[4], id .. ':facts')
  if not row.err and row[1] then
    how, attempts = 'p', row[1][4]
  elseif facts then
    attempts, failed = string.match(facts, '^(%d+)|([^|]*)|')
    local score = redis.call('ZSCORE', KEYS[2], id)
    if score then how, due = 'r', math.floor(tonumber(score))
    else how = redis.call('ZSCORE', KEYS[3], id) and 'h' or 'w' end
  end
  for _, part in ipairs({ how, tonumber(attempts), failed, due }) do out[#out + 1] = part end
end
return out
