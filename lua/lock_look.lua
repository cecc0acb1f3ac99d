-- Reads who holds a lock.
-- keys: lock, side
-- args: installation, token
-- flags: readonly
-- returns: {remaining ms, 1 if held under this token, a holder's field, the token and the owner of our own holder}; -2: it is free
local kind = redis.call('TYPE', lock).ok
if kind == 'none' then return {-2, 0} end
if kind ~= 'hash' then return {'type', kind} end
local seen = redis.call('HMGET', side, 'token', 'owner')
local ours = seen[1] and redis.call('HEXISTS', lock, installation .. ':' .. seen[1]) == 1
return {redis.call('PTTL', lock), redis.call('HEXISTS', lock, installation .. ':' .. token), redis.call('HKEYS', lock)[1],
  ours and seen[1], ours and seen[2]}
