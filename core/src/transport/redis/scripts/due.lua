#!lua flags=allow-oom
-- Takes what waits in a group and is due, after freeing what dead owners held. Their attempts count. What has expired
-- meanwhile is removed and counted, unless it is to be taken, too.
-- KEYS retry held work counts
-- ARGV token prefix | lease ms | most entries | most bytes | group | 1 to take what has expired, too, or ""
-- Returns {now, next due (-1: none), lost, then for each: id, event, attempt, first failed, token, 1 when it has expired}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 500)) do
  redis.call('ZADD', KEYS[1], 0, id)
  redis.call('ZREM', KEYS[2], id)
end
local out, lost, expired, size = { now, -1, 0 }, 0, 0, 0
local most = tonumber(ARGV[3])
local due = most > 0 and redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, most) or {}
for n, id in ipairs(due) do
  if size >= tonumber(ARGV[4]) then break end
  local event, facts = unpack(redis.call('HMGET', KEYS[3], id, id .. ':facts'))
  local attempt, failed, from = string.match(facts or '', '^(%d+)|([^|]*)|[^|]*|(.*)$')
  local expires = tonumber(string.match(from or '', '|(%d+)$') or '')
  local late = expires and expires <= now
  if event and from and (not late or ARGV[6] == '1') then
    attempt = attempt + 1
    local token = ARGV[1] .. n
    redis.call('ZADD', KEYS[2], now + ARGV[2], id)
    redis.call('HSET', KEYS[3], id .. ':facts', attempt .. '|' .. failed .. '|' .. token .. '|' .. from)
    size = size + #event
    for _, part in ipairs({ id, event, attempt, failed, token, late and 1 or 0 }) do out[#out + 1] = part end
  else
    redis.call('HDEL', KEYS[3], id, id .. ':facts')
    if event and late then expired = expired + 1 else lost = lost + 1 end
  end
  redis.call('ZREM', KEYS[1], id)
end
if expired > 0 then redis.call('HINCRBY', KEYS[4], ARGV[5] .. ':expired', expired) end
for _, key in ipairs({ KEYS[1], KEYS[2] }) do
  local found = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  local at = found[2] and math.ceil(tonumber(found[2]))
  if at and (out[2] < 0 or at < out[2]) then out[2] = at end
end
out[3] = lost
return out
