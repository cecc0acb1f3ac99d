-- Reads coupons for the reconciler, all at one moment, with n of the newest change.
-- keys: meta, coupons...
-- args: epoch, run
-- include: live
-- flags: readonly
-- returns: {'ok', n, values of a coupon, ...}, or what does not fit: 'nometa', 'epoch', 'run', 'state'
--
-- KEYS goes on with info and users of each coupon. Its values are total, issued, used, serial, state, why it is frozen, and how many users have
-- any; of one that is not there only false, and where a key is of another type only that type's name behind a '!'.
local FIXED = 1
local refusal = unfit(meta, epoch, run)
if refusal then return {refusal} end
local reply = {'ok', redis.call('HGET', meta, 'n')}
for at = FIXED + 1, #KEYS, 2 do
  local info, users = redis.call('TYPE', KEYS[at]).ok, redis.call('TYPE', KEYS[at + 1]).ok
  if info == 'none' then
    reply[#reply + 1] = false
  elseif info ~= 'hash' or (users ~= 'hash' and users ~= 'none') then
    reply[#reply + 1] = '!' .. (info ~= 'hash' and info or users)
  else
    local values = redis.call('HMGET', KEYS[at], 'total', 'issued', 'used', 'serial', 'state', 'frozen')
    -- A number that is missing is as good as one that is none.
    values[1] = values[1] or '?'
    for i = 1, 6 do reply[#reply + 1] = values[i] end
    reply[#reply + 1] = redis.call('HLEN', KEYS[at + 1])
  end
end
return reply
