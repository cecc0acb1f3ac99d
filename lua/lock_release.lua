-- Releases a lock once. The last time it is passed on to the next in this sidecar's queue, or all that wait for it are told.
-- keys: marker, lock, counter, side, done, channel
-- args: op, epoch, run, seen, deadline, installation, token, lease, owner, heir, keep, counted
-- include: lock
-- returns: {op, 'kept'} where it is still held, {op, 'passed', token, lease}, {op, 'released', clients told}, or {op, 'lost'} where it is not held under this token
--
-- lease, owner and heir are those of the next, and the op of their own attempts; lease 0: there is none. Past the deadline it is released and
-- not passed on: whoever was to have it may have gone. op as in lock_acquire; done is its own key, which says for keep ms what it did: 'released',
-- or the token of the next; for counted ms 'kept', since to do that twice would be one release more.
local field = installation .. ':' .. token
local kind = redis.call('TYPE', lock).ok
local before = redis.call('GET', done)
if before == 'kept' then return {op, 'kept'} end
if before and before ~= 'released' and kind == 'hash' and redis.call('HEXISTS', lock, installation .. ':' .. before) == 1 then
  return {op, 'passed', before, redis.call('PTTL', lock)}
end
if before then return {op, 'released', 0} end
if kind ~= 'hash' or redis.call('HEXISTS', lock, field) == 0 then return {op, 'lost'} end
if redis.call('HINCRBY', lock, field, -1) > 0 then
  redis.call('SET', done, 'kept', 'PX', counted)
  return {op, 'kept'}
end
redis.call('DEL', lock, side)
local time = redis.call('TIME')
local in_time = time[1] * 1000 + math.floor(time[2] / 1000) <= tonumber(deadline)
local floor = lease ~= '0' and in_time and floor_of(marker, epoch, run, seen)
local next_token = floor and take(marker, lock, counter, floor, epoch, installation, lease)
if next_token then
  note(side, lease + keep, 'op', heir, 'token', next_token, 'owner', owner, 'again', '')
  redis.call('SET', done, next_token, 'PX', keep)
  return {op, 'passed', next_token, tonumber(lease)}
end
local told = redis.call('PUBLISH', channel, '0')
redis.call('SET', done, 'released', 'PX', keep)
return {op, 'released', told}
