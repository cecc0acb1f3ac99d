-- Says on this node from which number on tokens are given out, if no other sidecar has said it since.
-- keys: marker
-- args: epoch, run
-- include: whole
-- returns: 'ok', or 'moved' where there is as high an epoch already
if redis.call('TYPE', marker).ok ~= 'hash' then redis.call('DEL', marker) end
local seen = redis.call('HMGET', marker, 'epoch', 'token')
if seen[1] and tonumber(seen[1]) >= tonumber(epoch) then return 'moved' end
redis.call('HSET', marker, 'epoch', epoch, 'run', run, 'token', whole(math.max(tonumber(seen[2]) or 0, tonumber(epoch) * 4294967296)))
return 'ok'
