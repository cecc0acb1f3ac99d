-- Lets a lock last longer that is still held under its token, and tells how many wait for it: those that listen on its channel.
-- keys: lock, side, channel
-- args: op, deadline, installation, token, lease, keep
-- returns: {op, 'kept', listening}, {op, 'lost'} where it is not held under this token, or {op, 'late'}: nothing was done
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(deadline) then return {op, 'late'} end
if redis.call('TYPE', lock).ok ~= 'hash' or redis.call('HEXISTS', lock, installation .. ':' .. token) == 0 then return {op, 'lost'} end
redis.call('PEXPIRE', lock, lease)
redis.call('PEXPIRE', side, lease + keep)
return {op, 'kept', redis.call('PUBSUB', 'NUMSUB', channel)[2]}
