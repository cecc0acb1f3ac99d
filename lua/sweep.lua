-- Removes the lanes of ended sidecars from meta.
-- keys: meta
-- args: fields
-- returns: how many there were
--
-- fields is msgpack: the names of lanes, each with what it held at the sweep before. One that has moved since is alive.
local removed = 0
for _, lane in ipairs(cmsgpack.unpack(fields)) do
  if string.find(lane[1], ':', 1, true) and redis.call('HGET', meta, lane[1]) == lane[2] then
    removed = removed + redis.call('HDEL', meta, lane[1])
  end
end
return removed
