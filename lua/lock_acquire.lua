-- Takes a lock if it is free, or once more for the owner that holds it.
-- keys: marker, lock, counter, side, done, needed...
-- args: op, epoch, run, seen, deadline, installation, lease, owner, fresh, keep, counted
-- include: lock
-- returns: {op, 'got', token, lease, 1 where the lease of the one before has ended}, {op, 'held', remaining ms, a holder's field}, {op, 'free'} where fresh is not '1' or what this op got is over, or what it could not do: {op, 'epoch'}, {op, 'spent', token}, {op, 'late'}, {op, 'type', type}, {op, 'absent'}
--
-- marker says which tokens this node has given, counter which this lock has, as Redisson's RFencedLock counts; side is who may acquire
-- once more, and the op of who has it. op names this attempt, and done is its own key, which says for keep ms which token it got: sent again,
-- it gives the same answer, and what arrives once that is over does nothing; one more of the same owner, which is counted, says so for counted
-- ms. keep: also how many ms side outlives the lock. needed: what has to be there for the lock to be of any use, if anything has to.
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(deadline) then return {op, 'late'} end
local floor = floor_of(marker, epoch, run, seen)
if not floor then return {op, 'epoch'} end
local kind = redis.call('TYPE', lock).ok
if kind ~= 'none' and kind ~= 'hash' then return {op, 'type', kind} end
local before = redis.call('GET', done)
if before then
  if redis.call('HEXISTS', lock, installation .. ':' .. before) == 0 then return {op, 'free'} end
  return {op, 'got', before, redis.call('PTTL', lock), 0}
end
local last = redis.call('HMGET', side, 'op', 'token', 'owner', 'again')
local holds = last[2] and redis.call('HEXISTS', lock, installation .. ':' .. last[2]) == 1
-- As long as it lasts the last of each is known without done.
if holds and (last[1] == op or last[4] == op) then return {op, 'got', last[2], redis.call('PTTL', lock), 0} end
if KEYS[6] and redis.call('EXISTS', KEYS[6]) == 0 then return {op, 'absent'} end
if holds and owner ~= '' and last[3] == owner then
  -- What is nested does not shorten what it is nested in.
  local left = math.max(redis.call('PTTL', lock), tonumber(lease))
  redis.call('HINCRBY', lock, installation .. ':' .. last[2], 1)
  redis.call('PEXPIRE', lock, left)
  note(side, left + keep, 'again', op)
  redis.call('SET', done, last[2], 'PX', counted)
  return {op, 'got', last[2], left, 0}
end
if kind == 'hash' then return {op, 'held', redis.call('PTTL', lock), redis.call('HKEYS', lock)[1]} end
if fresh ~= '1' then return {op, 'free'} end
local token, beyond = take(marker, lock, counter, floor, epoch, installation, lease)
if not token then return {op, 'spent', beyond} end
note(side, lease + keep, 'op', op, 'token', token, 'owner', owner, 'again', '')
redis.call('SET', done, token, 'PX', keep)
return {op, 'got', token, tonumber(lease), last[2] and 1 or 0}
