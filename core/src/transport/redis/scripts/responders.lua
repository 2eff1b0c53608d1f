-- Who answers requests.
-- KEYS responders meta
-- Returns {epoch, or "" | consumer|pattern of each that lives …}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local out = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')
table.insert(out, 1, redis.call('HGET', KEYS[2], 'epoch') or '')
return out
