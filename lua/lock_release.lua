-- Releases a lock once. The last time it is passed on to the next in this sidecar's queue, or all that wait for it are told.
-- keys: marker, lock, counter, side, done, channel
-- args: op, epoch, run, installation, token, lease, owner, keep
-- include: lock
-- returns: {op, 'kept'} where it is still held, {op, 'passed', token, lease}, {op, 'released', clients told}, or {op, 'lost'} where it is not held under this token
--
-- lease and owner are those of the next, lease 0: there is none. op as in lock_acquire; done is its own key, which says for keep ms what
-- it did, but for passing on: that stands in side, and nobody changes it before the next has been told.
local field = installation .. ':' .. token
local before = redis.call('GET', done)
if before == 'kept' then return {op, 'kept'} end
if before then return {op, 'released', 0} end
local kind = redis.call('TYPE', lock).ok
local seen = redis.call('HMGET', side, 'op', 'token')
if seen[1] == op then
  if kind == 'hash' and redis.call('HEXISTS', lock, installation .. ':' .. seen[2]) == 1 then
    return {op, 'passed', seen[2], redis.call('PTTL', lock)}
  end
  return {op, 'released', 0}
end
if kind ~= 'hash' or redis.call('HEXISTS', lock, field) == 0 then return {op, 'lost'} end
if redis.call('HINCRBY', lock, field, -1) > 0 then
  redis.call('SET', done, 'kept', 'PX', keep)
  return {op, 'kept'}
end
redis.call('DEL', lock, side)
local floor = lease ~= '0' and floor_of(marker, epoch, run)
local next_token = floor and take(marker, lock, counter, floor, epoch, installation, lease)
if next_token then
  note(side, lease + keep, 'op', op, 'token', next_token, 'owner', owner, 'again', '')
  return {op, 'passed', next_token, tonumber(lease)}
end
local told = redis.call('PUBLISH', channel, '0')
redis.call('SET', done, 'released', 'PX', keep)
return {op, 'released', told}
