-- Reads who holds a lock.
-- keys: lock, side
-- args: op, installation, token
-- flags: readonly
-- returns: {op, remaining ms, 1 if held under this token, a holder's field, the token and the owner of our own holder}; -2: it is free
local kind = redis.call('TYPE', lock).ok
if kind == 'none' then return {op, -2, 0} end
if kind ~= 'hash' then return {op, 'type', kind} end
local seen = redis.call('HMGET', side, 'token', 'owner')
local ours = seen[1] and redis.call('HEXISTS', lock, installation .. ':' .. seen[1]) == 1
return {op, redis.call('PTTL', lock), redis.call('HEXISTS', lock, installation .. ':' .. token), redis.call('HKEYS', lock)[1],
  ours and seen[1], ours and seen[2]}
