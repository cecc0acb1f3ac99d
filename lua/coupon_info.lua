-- Reads what COUPON.INFO shows, at one position.
-- keys: meta, info
-- args:
-- flags: readonly
-- returns: {total, issued, used, peruser, start, end, position, now in ms}
local time = redis.call('TIME')
local position = redis.call('HGET', meta, 'id')
local terms = redis.call('TYPE', info).ok == 'hash' and redis.call('HMGET', info, 'total', 'issued', 'used', 'peruser', 'start', 'end')
if not terms then return {false} end
return {terms[1], terms[2], terms[3], terms[4], terms[5], terms[6], position, time[1] * 1000 + math.floor(time[2] / 1000)}
