-- Hands entries of the log to one group again, attempts from 1, all in one step. What the group has to do already stays
-- as it is. In an ordered group each takes its place in its lane: behind what is active, before what was published later.
-- KEYS events retry work groups bell counts lanes
-- ARGV group | ids …
-- Returns how many were handed, or nothing when there is no such group.
if redis.call('HEXISTS', KEYS[4], ARGV[1]) == 0 then return false end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count = 0
local ordered = redis.call('HEXISTS', KEYS[6], ARGV[1] .. ':ordered') == 1
for at = 2, #ARGV do
  local id = ARGV[at]
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if (pending.err or #pending == 0) and redis.call('HEXISTS', KEYS[3], id .. ':facts') == 0 then
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    local fields = {}
    for i = 1, entry and #entry[2] or 0, 2 do fields[entry[2][i]] = entry[2][i + 1] end
    if fields.e and not fields.c then -- the store of work would not tell the codec
      redis.call('HSET', KEYS[3], id, fields.e, id .. ':facts', '0|||')
      local active, lane = true, nil
      if ordered and fields.k and fields.k ~= '' then
        lane = redis.sha1hex(fields.k)
        redis.call('HSET', KEYS[3], id .. ':lane', lane .. '|' .. place_of(id) .. '|||' .. (fields.t or ''))
        active = redis.call('HSETNX', KEYS[3], 'lane:' .. lane, id) == 1
      end
      if active then
        -- Due at the time of its publish: taken in the order of the log.
        local ms, number = string.match(id, '(%d+)-(%d+)')
        local due = math.min(ms + math.min(tonumber(number), 4095) / 4096, now)
        redis.call('ZADD', KEYS[2], string.format('%.17g', due), id)
      else
        redis.call('ZADD', KEYS[7], 0, lane .. ':' .. place_of(id) .. ':' .. id)
      end
      count = count + 1
    end
  end
end
if count > 0 then redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'why', 'replay') end
return count
