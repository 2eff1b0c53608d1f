#!lua flags=allow-oom
-- Marks of idempotent subscriptions: which keys a group handles, and which it has handled.
-- KEYS marks handling
-- ARGV lease ms | then 5 for each: what (b: begin, r: renew, a: handled, f: free) | key | token of the holder |
--   the delivery | how long to remember it, ms
-- `marks` has each key by the time at which it is forgotten; `handling`, while it is being handled, token|since|delivery.
-- Returns a number for each: 0 it is ours, or done; -1 it was handled before; else 1 + how long somebody handles it, ms
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease, out = tonumber(ARGV[1]), {}

for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[1], key)
  redis.call('HDEL', KEYS[2], key)
end

for at = 2, #ARGV, 5 do
  local what, key, token, delivery, keep = unpack(ARGV, at, at + 4)
  local holder, since, of
  local found = redis.call('HGET', KEYS[2], key)
  if found then holder, since, of = string.match(found, '^([^|]*)|([^|]*)|(.*)$') end
  local answer = 0
  if what == 'b' then
    local score = redis.call('ZSCORE', KEYS[1], key)
    local lives = score and tonumber(score) > now
    if lives and not holder then
      answer = -1
    -- Whoever took the same delivery before has lost it.
    elseif lives and holder ~= token and of ~= delivery then
      answer = 1 + math.max(0, now - tonumber(since))
    else
      redis.call('ZADD', KEYS[1], now + lease, key)
      redis.call('HSET', KEYS[2], key, token .. '|' .. string.format('%.0f', now) .. '|' .. delivery)
    end
  elseif what == 'r' then
    if holder == token then redis.call('ZADD', KEYS[1], now + lease, key) end
  elseif what == 'a' then
    -- Also when the mark ran out meanwhile: it was handled. Not when somebody else handles it again.
    if holder == token or not holder then
      redis.call('ZADD', KEYS[1], now + keep, key)
      redis.call('HDEL', KEYS[2], key)
    end
  elseif holder == token then
    redis.call('ZREM', KEYS[1], key)
    redis.call('HDEL', KEYS[2], key)
  end
  out[#out + 1] = answer
end
return out
