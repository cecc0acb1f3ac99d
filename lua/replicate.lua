-- Writes a little, so that a WAIT on this connection waits for everything that was written before it.
-- keys: meta
-- returns: epoch, run id and n, as they are in Redis; nothing is written where there is no partition
local found = redis.call('HMGET', meta, 'epoch', 'run', 'n')
if found[1] then redis.call('HINCRBY', meta, 'waits', 1) end
return found
