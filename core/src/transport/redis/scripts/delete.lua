-- Forgets a group, what it had not finished and its dead letters.
-- KEYS events groups counts meta bell retry held work dead lanes marks handling
-- ARGV group
local known = redis.call('HDEL', KEYS[2], ARGV[1])
local made = redis.pcall('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
local dropped = redis.call('DEL', KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11], KEYS[12])
redis.call('HDEL', KEYS[3], ARGV[1] .. ':expired', ARGV[1] .. ':ordered')
redis.call('HINCRBY', KEYS[4], 'version', 1)
redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'why', 'group')
if type(made) == 'table' then made = 0 end
return (known > 0 or made > 0 or dropped > 0) and 1 or 0
