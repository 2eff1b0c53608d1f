-- Marks as done what this group does not want, unless its pattern was changed meanwhile.
-- KEYS events groups counts
-- ARGV group | pattern | how many of the ids have expired | ids …
-- Returns the new pattern, and then nothing was done, or "".
local known = redis.call('HGET', KEYS[2], ARGV[1])
if not known then return redis.error_reply('NOGROUP the group is not known on this bus') end
local pattern = cjson.decode(known).pattern
if pattern ~= ARGV[2] then return pattern end
for first = 4, #ARGV, 1000 do
  redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, first, math.min(first + 999, #ARGV)))
end
if ARGV[3] ~= '0' then redis.call('HINCRBY', KEYS[3], ARGV[1] .. ':expired', ARGV[3]) end
return ''
