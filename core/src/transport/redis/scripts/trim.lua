#!lua flags=allow-oom
-- Removes from the log what every group has finished and is older than the retention. Never what one has not.
-- KEYS events meta
-- ARGV retention ms | shortest time between two sweeps, ms | most entries
-- Returns {removed, 1 when there may be more}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local swept = tonumber(redis.call('HGET', KEYS[2], 'swept') or 0)
if now - swept < tonumber(ARGV[2]) and now >= swept then return { 0, 0 } end
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err or #groups == 0 then return { 0, 0 } end -- a group may still be made that starts at the beginning
redis.call('HSET', KEYS[2], 'swept', now)

local function before(am, an, bm, bn) return am < bm or (am == bm and an < bn) end
local ms, number = now - ARGV[1], 0
for _, group in ipairs(groups) do
  local row = {}
  for i = 1, #group, 2 do row[group[i]] = group[i + 1] end
  local gm, gn = string.match(row['last-delivered-id'], '(%d+)-(%d+)')
  gm, gn = tonumber(gm), tonumber(gn) + 1
  if row['pending'] > 0 then
    local oldest = redis.call('XPENDING', KEYS[1], row['name'])[2]
    gm, gn = string.match(oldest, '(%d+)-(%d+)')
    gm, gn = tonumber(gm), tonumber(gn)
  end
  if before(gm, gn, ms, number) then ms, number = gm, gn end
end
if ms < 0 then return { 0, 0 } end
local limit = string.format('%.0f-%.0f', ms, number)
-- Whole blocks of the stream first, which is cheap and bounded; the rest of the last block exactly.
local removed = redis.call('XTRIM', KEYS[1], 'MINID', '~', limit, 'LIMIT', ARGV[3])
if removed > 0 then return { removed, 1 } end
return { redis.call('XTRIM', KEYS[1], 'MINID', '=', limit), 0 }
