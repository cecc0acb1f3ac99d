-- Removes the lanes of ended sidecars from meta.
-- keys: meta
-- args: fields
-- returns: how many there were
--
-- fields is msgpack: the names of lanes.
local removed = 0
for _, field in ipairs(cmsgpack.unpack(fields)) do
  if string.find(field, ':', 1, true) then removed = removed + redis.call('HDEL', meta, field) end
end
return removed
