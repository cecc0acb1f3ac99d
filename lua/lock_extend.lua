-- Sets how long locks last from now on, those that are still held under their tokens.
-- keys: pairs...
-- args: op, deadline, installation, keep, batch
-- returns: {op, for each 1, or 0 where it is not held under this token...}, or {op, 'late'}: nothing was done
--
-- KEYS is lock and side of each; batch is msgpack {{token, ms, whether it may be shortened by that}, ...}.
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(deadline) then return {op, 'late'} end
local reply = {op}
for i, wanted in ipairs(cmsgpack.unpack(batch)) do
  local lock, side = KEYS[i * 2 - 1], KEYS[i * 2]
  reply[i + 1] = 0
  if redis.call('TYPE', lock).ok == 'hash' and redis.call('HEXISTS', lock, installation .. ':' .. wanted[1]) == 1 then
    if wanted[3] or redis.call('PTTL', lock) < wanted[2] then
      redis.call('PEXPIRE', lock, wanted[2])
      redis.call('PEXPIRE', side, wanted[2] + keep)
    end
    reply[i + 1] = 1
  end
end
return reply
