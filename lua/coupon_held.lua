-- Reads what a user has of a coupon.
-- keys: meta, info, users
-- args: epoch, run, user
-- include: live
-- flags: readonly
-- returns: {'ok', whether there is the coupon (0, 1), the user's lines or false, n of the newest change}, or what does not fit
local refusal = unfit(meta, epoch, run)
if refusal then return {refusal} end
return {'ok', redis.call('EXISTS', info), redis.call('HGET', users, user), tonumber(redis.call('HGET', meta, 'n'))}
