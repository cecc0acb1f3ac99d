-- Removes fields of a hash that still are as they were: the lanes of ended sidecars from meta, deletions that are long over.
-- keys: hash
-- args: fields
-- returns: how many there were
--
-- fields is msgpack: their names, each with what it held when it was looked at. One that has moved since is alive.
local removed = 0
for _, field in ipairs(cmsgpack.unpack(fields)) do
  if redis.call('HGET', hash, field[1]) == field[2] then removed = removed + redis.call('HDEL', hash, field[1]) end
end
return removed
