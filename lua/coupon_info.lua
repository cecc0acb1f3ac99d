-- Reads what COUPON.INFO shows, at one position.
-- keys: meta, info
-- args: epoch, run
-- include: live
-- flags: readonly
-- returns: {'ok', total, issued, used, peruser, start, end, state, position, now in ms}, {'ok', false, n of the newest change}, or what does not fit
local refusal = unfit(meta, epoch, run)
if refusal then return {refusal} end
local time = redis.call('TIME')
local position = redis.call('HGET', meta, 'id')
local terms = redis.call('TYPE', info).ok == 'hash'
  and redis.call('HMGET', info, 'total', 'issued', 'used', 'peruser', 'start', 'end', 'state')
if not terms then return {'ok', false, tonumber(redis.call('HGET', meta, 'n'))} end
return {'ok', terms[1], terms[2], terms[3], terms[4], terms[5], terms[6], terms[7], position, time[1] * 1000 + math.floor(time[2] / 1000)}
