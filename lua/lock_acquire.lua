-- Takes a lock if it is free, or once more for the owner that holds it.
-- keys: marker, lock, counter, side
-- args: epoch, run, deadline, installation, op, lease, owner, fresh, keep
-- include: lock
-- returns: {'got', token, lease}, {'held', remaining ms}, {'free'} where fresh is not '1', or what it could not do: {'epoch'}, {'spent', token}, {'late'}, {'type', type}
--
-- marker says which tokens this node has given, counter which this lock has, as Redisson's RFencedLock counts; side is who may acquire
-- once more, and what was done last. op names this attempt: sent again, it gives the same answer. keep: ms that side outlives the lock.
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(deadline) then return {'late'} end
local floor = floor_of(marker, epoch, run)
if not floor then return {'epoch'} end
local kind = redis.call('TYPE', lock).ok
if kind ~= 'none' and kind ~= 'hash' then return {'type', kind} end
local seen = redis.call('HMGET', side, 'op', 'token', 'owner')
local holds = seen[2] and redis.call('HEXISTS', lock, installation .. ':' .. seen[2]) == 1
if holds and seen[1] == op then return {'got', seen[2], redis.call('PTTL', lock)} end
if holds and owner ~= '' and seen[3] == owner then
  -- What is nested does not shorten what it is nested in.
  local left = math.max(redis.call('PTTL', lock), tonumber(lease))
  redis.call('HINCRBY', lock, installation .. ':' .. seen[2], 1)
  redis.call('PEXPIRE', lock, left)
  note(side, left + keep, 'op', op, 'did', 'got')
  return {'got', seen[2], left}
end
if kind == 'hash' then return {'held', redis.call('PTTL', lock)} end
if fresh ~= '1' then return {'free'} end
local token, beyond = take(marker, lock, counter, floor, epoch, installation, lease)
if not token then return {'spent', beyond} end
note(side, lease + keep, 'op', op, 'did', 'got', 'token', token, 'owner', owner)
return {'got', token, tonumber(lease)}
