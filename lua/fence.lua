-- Takes the partition to fill this Redis (rebuild), or Postgres from it (adopt): from here on no script writes under an earlier epoch, nor under
-- this one until it is opened.
-- keys: meta
-- args: to, state
-- returns: 'ok', also where it is being filled under that epoch already, or 'moved' where it is open under it or under a later one
local kind = redis.call('TYPE', meta).ok
local epoch = kind == 'hash' and tonumber(redis.call('HGET', meta, 'epoch'))
if epoch and epoch > tonumber(to) then return 'moved' end
if epoch == tonumber(to) and redis.call('HGET', meta, 'state') ~= state then return 'moved' end
if kind ~= 'hash' and kind ~= 'none' then redis.call('DEL', meta) end
redis.call('HSET', meta, 'epoch', to, 'run', '', 'state', state)
return 'ok'
