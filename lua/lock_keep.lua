-- Lets a lock last longer that is still held under its token, unless more than ours listen on its channel: those wait for it.
-- keys: lock, side, channel
-- args: op, deadline, installation, token, lease, keep, ours
-- returns: {op, 'kept'}, {op, 'wanted'} where others listen, {op, 'lost'} where it is not held under this token, or {op, 'late'}: nothing was done
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(deadline) then return {op, 'late'} end
if redis.call('TYPE', lock).ok ~= 'hash' or redis.call('HEXISTS', lock, installation .. ':' .. token) == 0 then return {op, 'lost'} end
if redis.call('PUBSUB', 'NUMSUB', channel)[2] > tonumber(ours) then return {op, 'wanted'} end
redis.call('PEXPIRE', lock, lease)
redis.call('PEXPIRE', side, lease + keep)
return {op, 'kept'}
