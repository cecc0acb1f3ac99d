-- Reads how many of some coupons can still be issued, for COUPON.SCAN.
-- keys: infos...
-- args:
-- flags: readonly
-- returns: a number a coupon, false where there is none any more, or it is deleted
local found = {}
for i, key in ipairs(KEYS) do
  local terms = redis.call('TYPE', key).ok == 'hash' and redis.call('HMGET', key, 'total', 'issued', 'state') or {}
  local total, issued = tonumber(terms[1]), tonumber(terms[2])
  found[i] = total and issued and terms[3] ~= 'deleted' and math.max(total - issued, 0) or false
end
return found
