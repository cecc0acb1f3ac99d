-- Releases a lock once. The last time it is passed on to the next in this sidecar's queue, or all that wait for it are told.
-- keys: marker, lock, counter, side, channel
-- args: epoch, run, installation, op, token, lease, owner, keep
-- include: lock
-- returns: {'kept', times still held}, {'passed', token, lease}, {'released', clients told}, or {'lost'} where it is not held under this token
--
-- lease and owner are those of the next, lease 0: there is none. op as in lock_acquire.
local field = installation .. ':' .. token
local kind = redis.call('TYPE', lock).ok
local seen = redis.call('HMGET', side, 'op', 'did', 'token')
if seen[1] == op then
  local left = kind == 'hash' and redis.call('HGET', lock, installation .. ':' .. (seen[3] or token))
  if seen[2] == 'passed' and left then return {'passed', seen[3], redis.call('PTTL', lock)} end
  if seen[2] == 'kept' and left then return {'kept', tonumber(left)} end
  return {'released', 0}
end
if kind ~= 'hash' or redis.call('HEXISTS', lock, field) == 0 then return {'lost'} end
local left = redis.call('HINCRBY', lock, field, -1)
if left > 0 then
  redis.call('HSET', side, 'op', op, 'did', 'kept')
  return {'kept', left}
end
redis.call('DEL', lock, side)
local floor = lease ~= '0' and floor_of(marker, epoch, run)
local next_token = floor and take(marker, lock, counter, floor, epoch, installation, lease)
if next_token then
  note(side, lease + keep, 'op', op, 'did', 'passed', 'token', next_token, 'owner', owner)
  return {'passed', next_token, tonumber(lease)}
end
local told = redis.call('PUBLISH', channel, '0')
note(side, keep, 'op', op, 'did', 'released')
return {'released', told}
