-- Opens a partition to this Redis process under a new epoch, if it still is as the verifier saw it.
-- keys: meta
-- args: from, to, run, n, last
-- returns: 'ok', or 'moved' if another sidecar was faster
--
-- from is the epoch seen, empty where there was no meta yet; n and last are then what it starts with.
local found = redis.call('HMGET', meta, 'epoch', 'n', 'last')
if (found[1] or '') ~= from then return 'moved' end
if found[1] then
  if found[2] ~= n or found[3] ~= last then return 'moved' end
  redis.call('HSET', meta, 'epoch', to, 'run', run, 'state', 'live')
else
  redis.call('HSET', meta, 'epoch', to, 'run', run, 'state', 'live', 'n', n, 'last', last)
end
return 'ok'
