-- Ends leases of an ordered group, as `settle` does of the others; what is gone or dead lets the next one of its lane go.
-- KEYS retry held work dead bell lanes
-- ARGV as of `settle`; everything is held in `work`
-- Returns {how many may go now, then the numbers, from 0, of those that were not ours any more}.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local retry, held, work, lanes = KEYS[1], KEYS[2], KEYS[3], KEYS[6]
local out, ring = { 0 }, false
for at = 4, #ARGV, 14 do
  local id, fence, verdict = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local facts = redis.call('HGET', work, id .. ':facts')
  local token, from = string.match(facts or '', '^%d+|[^|]*|([^|]*)|(.*)$')
  if token ~= fence or not redis.call('ZSCORE', held, id) then
    out[#out + 1] = (at - 4) / 14
  else
    local failed = ARGV[at + 6]
    if failed == '' and verdict ~= 'b' and verdict ~= 'l' then failed = tostring(now) end
    if verdict == 'r' or verdict == 'b' or verdict == 'l' then
      redis.call('ZADD', retry, verdict == 'b' and 0 or now + ARGV[at + 4], id)
      redis.call('HSET', work, id .. ':facts', ARGV[at + 5] .. '|' .. failed .. '||' .. from)
      ring = ring or verdict == 'b'
    else
      if verdict == 'd' then
        local lane = string.match(redis.call('HGET', work, id .. ':lane') or '', '^[^|]*|[^|]*')
        redis.call('XADD', KEYS[4], '*', 't', ARGV[at + 7], 'e', redis.call('HGET', work, id), 'r', ARGV[at + 9],
          'k', ARGV[at + 10], 'm', ARGV[at + 11], 's', ARGV[at + 12], 'n', ARGV[at + 5], 'f', failed, 'l', now,
          'u', ARGV[3], 'p', string.match(from, '^[^|]*'), 'i', string.match(id, '^%d+%-%d+$') or '', 'o', lane or '')
      end
      redis.call('HDEL', work, id, id .. ':facts')
      out[1] = out[1] + proceed(retry, work, lanes, id)
    end
    redis.call('ZREM', held, id)
  end
end
if ring then redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'why', 'given back') end
return out
