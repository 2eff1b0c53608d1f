#!lua flags=allow-oom
-- Keeps leases for another period; those that are not ours any more are left alone.
-- KEYS events held work counts
-- ARGV group | consumer | lease ms | then 3 for each: how it is held | id | fence
-- Returns the numbers, from 0, of those that were lost.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local pending, renew, numbers, lost = {}, {}, {}, {}
local rows = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 100000, ARGV[2])
if not rows.err then
  for _, row in ipairs(rows) do pending[row[1]] = row[4] end
end
for at = 4, #ARGV, 3 do
  local id, fence = ARGV[at + 1], ARGV[at + 2]
  local ours
  if ARGV[at] == 'p' then
    ours = pending[id] == tonumber(fence)
    if ours then renew[#renew + 1], numbers[id] = id, (at - 4) / 3 end
  else
    local facts = redis.call('HGET', KEYS[3], id .. ':facts')
    ours = facts and string.match(facts, '^%d+|[^|]*|([^|]*)|') == fence and redis.call('ZSCORE', KEYS[2], id)
    if ours then redis.call('ZADD', KEYS[2], now + ARGV[3], id) end
  end
  if not ours then lost[#lost + 1] = (at - 4) / 3 end
end
for first = 1, #renew, 1000 do
  -- The heartbeat resets the idle time; JUSTID keeps it from counting as a delivery.
  local command = { 'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0 }
  for i = first, math.min(first + 999, #renew) do command[#command + 1] = renew[i] end
  command[#command + 1] = 'JUSTID'
  for _, id in ipairs(redis.call(unpack(command))) do numbers[id] = nil end
end
-- What a limit of the user removed from the log is not pending any more, and comes back to nobody.
for _, number in pairs(numbers) do
  lost[#lost + 1] = number
  redis.call('HINCRBY', KEYS[4], ARGV[1] .. ':expired', 1)
end
return lost
