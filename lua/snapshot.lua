-- Reads what the reconciler compares with Postgres, all at one moment.
-- keys: meta, frozen, held, products...
-- args: epoch, run, names
-- include: live
-- flags: readonly
-- returns: {'ok', n, inbox mark, value, reason, held, value, reason, held, ...}, or what does not fit: 'nometa', 'epoch', 'run', 'state'
--
-- names is msgpack. A value is the text that the product's key holds, at most 40 bytes of it; of another type its name behind a '!'.
local FIXED = 3
local refusal = unfit(meta, epoch, run)
if refusal then return {refusal} end
local m = redis.call('HMGET', meta, 'n', 'inbox')
local values = redis.call('MGET', unpack(KEYS, FIXED + 1))
names = cmsgpack.unpack(names)
local reasons, units = redis.call('HMGET', frozen, unpack(names)), redis.call('HMGET', held, unpack(names))
local reply = {'ok', m[1], m[2] or '0:0'}
for i = 1, #values do
  local value = values[i] and string.sub(values[i], 1, 40)
  if not value then
    local kind = redis.call('TYPE', KEYS[FIXED + i]).ok
    value = kind ~= 'none' and '!' .. kind
  end
  reply[#reply + 1] = value
  reply[#reply + 1] = reasons[i]
  reply[#reply + 1] = units[i]
end
return reply
