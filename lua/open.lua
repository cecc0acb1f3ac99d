-- Opens a partition that was filled anew to this Redis process, if it still is being filled under this epoch.
-- keys: meta, outbox
-- args: epoch, run, n, last, id, inbox
-- returns: 'ok', or 'moved'
local found = redis.call('HMGET', meta, 'epoch', 'state')
if found[1] ~= epoch or found[2] ~= 'rebuild' and found[2] ~= 'adopt' then return 'moved' end
-- Postgres has been given all of it.
if found[2] == 'adopt' then redis.call('UNLINK', outbox) end
redis.call('HSET', meta, 'run', run, 'state', 'live', 'n', n, 'last', last, 'id', id, 'inbox', inbox)
redis.call('HSET', meta, 'corrected', n .. ':')
return 'ok'
