-- Puts a letter into a mailbox that lives as long as its youngest letter may.
-- KEYS mailbox
-- ARGV letter | ttl ms
redis.call('RPUSH', KEYS[1], ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
