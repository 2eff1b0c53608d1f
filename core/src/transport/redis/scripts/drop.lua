-- Removes entries by the user's own limits, finished or not, after the caller counted what each group loses.
-- KEYS events counts
-- ARGV first id that stays | then 3 for each group: name | its last delivered id as counted | lost
-- Returns 1, or 0 when a group has moved meanwhile and must be counted again.
local at = {}
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local row = {}
  for i = 1, #group, 2 do row[group[i]] = group[i + 1] end
  at[row['name']] = row['last-delivered-id']
end
for i = 2, #ARGV, 3 do
  if at[ARGV[i]] ~= ARGV[i + 1] then return 0 end
end
redis.call('XTRIM', KEYS[1], 'MINID', '=', ARGV[1])
for i = 2, #ARGV, 3 do
  if ARGV[i + 2] ~= '0' then redis.call('HINCRBY', KEYS[2], ARGV[i] .. ':expired', ARGV[i + 2]) end
end
return 1
