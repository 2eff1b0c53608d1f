-- Ends leases that the plain XACK may not end: whoever cannot show consumer and delivery count, or the token, changes
-- nothing. What is copied is copied before anything is removed, so that a full server refuses the whole step.
-- KEYS events retry held work dead bell
-- ARGV group | consumer | last entry's label | then 14 for each: how it is held (p: pending list, w: work) | id |
--   fence | verdict (a: ack, r: retry, b: give back, l: give back for later, d: dead) | delay ms | attempt | first failed | type | event |
--   reason | error kind | error message | error stack | when it expires, or "" (what is in `work` has that there)
-- Returns the numbers, from 0, of those that were not ours any more.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local group, consumer, subscription = ARGV[1], ARGV[2], ARGV[3]
local lost, acks, ring = {}, {}, false

local function ours(held, id, fence)
  if held == 'w' then
    local facts = redis.call('HGET', KEYS[4], id .. ':facts')
    return facts and string.match(facts, '^%d+|[^|]*|([^|]*)|') == fence and redis.call('ZSCORE', KEYS[3], id)
  end
  local row = redis.pcall('XPENDING', KEYS[1], group, id, id, 1, consumer)
  if row.err then return false end -- no such group any more
  return row[1] and row[1][4] == tonumber(fence)
end

for at = 4, #ARGV, 14 do
  local held, id, fence, verdict = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  if not ours(held, id, fence) then
    lost[#lost + 1] = (at - 4) / 14
  else
    local event, from = ARGV[at + 8], ARGV[at + 13] ~= '' and '|' .. ARGV[at + 13] or ''
    if held == 'w' then
      event = redis.call('HGET', KEYS[4], id)
      from = string.match(redis.call('HGET', KEYS[4], id .. ':facts'), '^%d+|[^|]*|[^|]*|(.*)$')
    end
    local failed = ARGV[at + 6]
    if verdict == 'r' or verdict == 'b' or verdict == 'l' then
      if verdict == 'r' and failed == '' then failed = tostring(now) end
      local due = verdict ~= 'b' and now + ARGV[at + 4] or 0
      redis.call('ZADD', KEYS[2], due, id)
      redis.call('HSET', KEYS[4], id, event, id .. ':facts', ARGV[at + 5] .. '|' .. failed .. '||' .. from)
      ring = ring or verdict == 'b'
    elseif verdict == 'd' then
      if failed == '' then failed = tostring(now) end
      local entry = string.match(id, '^%d+%-%d+$') or ''
      redis.call('XADD', KEYS[5], '*', 't', ARGV[at + 7], 'e', event, 'r', ARGV[at + 9], 'k', ARGV[at + 10],
        'm', ARGV[at + 11], 's', ARGV[at + 12], 'n', ARGV[at + 5], 'f', failed, 'l', now, 'u', subscription,
        'p', string.match(from, '^[^|]*'), 'i', entry)
    end
    if held == 'p' then
      acks[#acks + 1] = id
    else
      redis.call('ZREM', KEYS[3], id)
      if verdict == 'a' or verdict == 'd' then redis.call('HDEL', KEYS[4], id, id .. ':facts') end
    end
  end
end
for first = 1, #acks, 1000 do
  redis.call('XACK', KEYS[1], group, unpack(acks, first, math.min(first + 999, #acks)))
end
if ring then redis.call('XADD', KEYS[6], 'MAXLEN', 1, '*', 'why', 'given back') end
return lost
