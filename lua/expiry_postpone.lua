-- Has orders that are due and cannot expire stand behind others. Only the list of what is due says so: until when an order is held it says itself.
-- keys: lease, expiry
-- args: instance, orders
-- include: whole
-- returns: how many
--
-- orders is msgpack: {{order, until ms}, ...}.
if redis.call('GET', lease) ~= instance then return 0 end
local time = redis.call('TIME')
local now, count = time[1] * 1000 + math.floor(time[2] / 1000), 0
for _, entry in ipairs(cmsgpack.unpack(orders)) do
  local order, till = unpack(entry)
  local due = tonumber(redis.call('ZSCORE', expiry, order))
  -- A client may have extended it since.
  if due and due <= now then
    redis.call('ZADD', expiry, whole(till), order)
    count = count + 1
  end
end
return count
