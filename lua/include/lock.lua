-- include: whole
-- The number above which this node's next token has to be; nil where it is to be agreed anew, as where it lies below one that was seen.
local function floor_of(marker, epoch, run, seen)
  local m = redis.call('HMGET', marker, 'epoch', 'run', 'token')
  if m[1] ~= epoch or m[2] ~= run or (tonumber(m[3]) or 0) < tonumber(seen) then return nil end
  return tonumber(m[3])
end

-- Takes a lock that is free, in Redisson's layout: its token, or nil and the token that it cannot have under this epoch.
local function take(marker, lock, counter, floor, epoch, installation, lease)
  local seen = redis.call('GET', counter)
  local token = math.max(seen and string.find(seen, '^%d+$') and tonumber(seen) or 0, floor) + 1
  if token >= (tonumber(epoch) + 1) * 4294967296 then return nil, whole(token) end
  token = whole(token)
  redis.call('SET', counter, token)
  redis.call('HSET', marker, 'token', token)
  redis.call('HSET', lock, installation .. ':' .. token, '1')
  redis.call('PEXPIRE', lock, lease)
  return token
end

-- Notes what was done last, so that it can be repeated without being done twice, and who may acquire once more.
local function note(side, lasts, ...)
  redis.call('HSET', side, ...)
  redis.call('PEXPIRE', side, lasts)
end
