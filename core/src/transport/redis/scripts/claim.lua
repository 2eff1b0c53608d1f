-- Takes over what consumers without a heartbeat hold. The attempt counts: the process died in it, perhaps of it.
-- KEYS events counts
-- ARGV group | consumer | lease ms | most entries
-- Returns {lost, then for each: id, delivery count, fields}
local stale, counts = {}, {}
for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], '-', '+', ARGV[4] + 1000)) do
  if row[2] ~= ARGV[2] and #stale < tonumber(ARGV[4]) then
    stale[#stale + 1] = row[1]
    counts[row[1]] = row[4] + 1
  end
end
if #stale == 0 then return { 0 } end
local out, found = { 0 }, 0
local command = { 'XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], unpack(stale) }
for _, entry in ipairs(redis.call(unpack(command))) do
  if entry and entry[2] then
    found = found + 1
    for _, part in ipairs({ entry[1], counts[entry[1]], entry[2] }) do out[#out + 1] = part end
  end
end
-- What a limit of the user removed from the log has no body: older servers leave it in the list.
out[1] = #stale - found
if out[1] > 0 then
  for _, id in ipairs(stale) do
    if #redis.call('XRANGE', KEYS[1], id, id) == 0 then redis.call('XACK', KEYS[1], ARGV[1], id) end
  end
  redis.call('HINCRBY', KEYS[2], ARGV[1] .. ':expired', out[1])
end
return out
