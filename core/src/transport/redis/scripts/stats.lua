-- Counts what a group has. The log itself is counted by `types`.
-- KEYS events groups counts retry held work dead lanes
-- ARGV group
-- Returns {facts (JSON), now, last delivered id, leased, waiting, dead, expired, oldest ms (-1: none),
-- parked}, or nothing.
local facts = redis.call('HGET', KEYS[2], ARGV[1])
if not facts then return false end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local delivered, pending, oldest = '0-0', 0, -1
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
for i = 1, groups.err and 0 or #groups do
  local row = {}
  for n = 1, #groups[i], 2 do row[groups[i][n]] = groups[i][n + 1] end
  if row['name'] == ARGV[1] then
    delivered, pending = row['last-delivered-id'], row['pending']
    if pending > 0 then
      oldest = tonumber(string.match(redis.call('XPENDING', KEYS[1], ARGV[1])[2], '^(%d+)'))
    end
  end
end
for _, key in ipairs({ KEYS[4], KEYS[5] }) do
  for _, id in ipairs(redis.call('ZRANGE', key, 0, 99)) do
    local ms = tonumber(string.match(id, '(%d+)%-%d+$'))
    if ms and (oldest < 0 or ms < oldest) then oldest = ms end
  end
end
return {
  facts, now, delivered, pending + redis.call('ZCARD', KEYS[5]), redis.call('ZCARD', KEYS[4]),
  redis.call('XLEN', KEYS[7]), tonumber(redis.call('HGET', KEYS[3], ARGV[1] .. ':expired') or 0), oldest, redis.call('ZCARD', KEYS[8]),
}
