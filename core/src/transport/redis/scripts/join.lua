#!lua flags=allow-oom
-- Joins a group, making it when it is new, and also after a reset: the server has lost the group or its stream.
-- KEYS events groups meta bell counts
-- ARGV group | facts (JSON) | start of a new group | a fresh epoch | known epoch, or "" for a first join | cursor |
-- 1 when it is to be ordered, or ""
-- Returns {epoch, version, last delivered id, now}, or "deleted", or "other order".
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local epoch = redis.call('HGET', KEYS[3], 'epoch')
local known = redis.call('HGET', KEYS[2], ARGV[1])
if ARGV[5] ~= '' and epoch == ARGV[5] and not known then
  return 'deleted' -- by somebody who meant it: everything else of this bus is still there
end
if known and (redis.call('HGET', KEYS[5], ARGV[1] .. ':ordered') or '') ~= ARGV[7] then return 'other order' end
if not epoch then
  epoch = ARGV[4]
  redis.call('HSET', KEYS[3], 'epoch', epoch, 'format', '1')
end

local function after(a, b)
  local am, an = string.match(a, '(%d+)-(%d+)')
  local bm, bn = string.match(b, '(%d+)-(%d+)')
  am, an, bm, bn = tonumber(am), tonumber(an), tonumber(bm), tonumber(bn)
  return am > bm or (am == bm and an > bn)
end

local start = ARGV[3]
if ARGV[5] ~= '' or known then
  -- The group should be there. If it is not, what it had done is lost: go on after what this process has seen, or from
  -- the beginning of a stream that is younger than that.
  local stream = redis.pcall('XINFO', 'STREAM', KEYS[1])
  local last = '0-0'
  for i = 1, stream.err and 0 or #stream, 2 do
    if stream[i] == 'last-generated-id' then last = stream[i + 1] end
  end
  start = (ARGV[6] ~= '' and not after(ARGV[6], last)) and ARGV[6] or '0'
end
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], start, 'MKSTREAM')
if made.err and not string.find(made.err, 'BUSYGROUP') then return made end

local facts = cjson.decode(ARGV[2])
local changed = true
if known then
  local before = cjson.decode(known)
  facts.created, facts.start = before.created, before.start
  changed = before.pattern ~= facts.pattern
else
  facts.created = now
  redis.call('HDEL', KEYS[5], ARGV[1] .. ':ordered')
end
-- Not among the facts: an older polybus would write them without it.
if ARGV[7] ~= '' then redis.call('HSET', KEYS[5], ARGV[1] .. ':ordered', ARGV[7]) end
facts.seen = now
redis.call('HSET', KEYS[2], ARGV[1], cjson.encode(facts))
if changed then
  redis.call('HINCRBY', KEYS[3], 'version', 1)
  redis.call('XADD', KEYS[4], 'MAXLEN', 1, '*', 'why', 'group')
end
local delivered = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local row = {}
  for i = 1, #group, 2 do row[group[i]] = group[i + 1] end
  if row['name'] == ARGV[1] then delivered = row['last-delivered-id'] end
end
return { epoch, tonumber(redis.call('HGET', KEYS[3], 'version') or 0), delivered, now }
