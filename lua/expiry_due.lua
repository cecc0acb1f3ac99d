-- Names the orders whose time has passed to whoever has the right to expire them, and takes or renews that right.
-- keys: lease, expiry
-- args: instance, lease_ms, limit
-- include: whole
-- returns: now in ms and the orders, the oldest first; nothing where another has the right
local owner = redis.call('GET', lease)
if owner and owner ~= instance then return {} end
redis.call('SET', lease, instance, 'PX', lease_ms)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', expiry, '-inf', whole(now), 'LIMIT', 0, limit)
table.insert(due, 1, now)
return due
