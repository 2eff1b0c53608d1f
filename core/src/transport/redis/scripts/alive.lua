#!lua flags=allow-oom
-- A sign of life of a responder; without lease, its farewell. Forgets those that gave none for their lease.
-- KEYS responders
-- ARGV consumer|pattern | lease ms, 0 when it leaves
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if ARGV[2] == '0' then return redis.call('ZREM', KEYS[1], ARGV[1]) end
return redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
