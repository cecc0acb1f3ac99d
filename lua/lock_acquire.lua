-- Takes a lock if it is free, or once more for the owner that holds it.
-- keys: marker, lock, counter, side
-- args: op, epoch, run, deadline, installation, lease, owner, fresh, keep
-- include: lock
-- returns: {op, 'got', token, lease, 1 where the lease of the one before has ended}, {op, 'held', remaining ms, a holder's field}, {op, 'free'} where fresh is not '1', or what it could not do: {op, 'epoch'}, {op, 'spent', token}, {op, 'late'}, {op, 'type', type}
--
-- marker says which tokens this node has given, counter which this lock has, as Redisson's RFencedLock counts; side is who may acquire
-- once more, and the op of who has it. op names this attempt: sent again, it gives the same answer. keep: ms that side outlives the lock.
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(deadline) then return {op, 'late'} end
local floor = floor_of(marker, epoch, run)
if not floor then return {op, 'epoch'} end
local kind = redis.call('TYPE', lock).ok
if kind ~= 'none' and kind ~= 'hash' then return {op, 'type', kind} end
local seen = redis.call('HMGET', side, 'op', 'token', 'owner', 'again')
local holds = seen[2] and redis.call('HEXISTS', lock, installation .. ':' .. seen[2]) == 1
if holds and (seen[1] == op or seen[4] == op) then return {op, 'got', seen[2], redis.call('PTTL', lock), 0} end
if holds and owner ~= '' and seen[3] == owner then
  -- What is nested does not shorten what it is nested in.
  local left = math.max(redis.call('PTTL', lock), tonumber(lease))
  redis.call('HINCRBY', lock, installation .. ':' .. seen[2], 1)
  redis.call('PEXPIRE', lock, left)
  note(side, left + keep, 'again', op)
  return {op, 'got', seen[2], left, 0}
end
if kind == 'hash' then return {op, 'held', redis.call('PTTL', lock), redis.call('HKEYS', lock)[1]} end
if fresh ~= '1' then return {op, 'free'} end
local token, beyond = take(marker, lock, counter, floor, epoch, installation, lease)
if not token then return {op, 'spent', beyond} end
note(side, lease + keep, 'op', op, 'token', token, 'owner', owner, 'again', '')
return {op, 'got', token, tonumber(lease), seen[2] and 1 or 0}
