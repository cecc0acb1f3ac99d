-- Says which locks ended by their leases, each once: of what was released nothing is noted any more.
-- keys: pairs...
-- args: op, installation, batch
-- returns: {op, for each 1 where its lease ended under this token and nobody has said so yet, else 0...}
--
-- KEYS is lock and side of each; batch is msgpack {token, ...}. Whoever acquires a lock over an ended lease says so instead, see
-- lock_acquire.
local reply = {op}
for i, token in ipairs(cmsgpack.unpack(batch)) do
  local lock, side = KEYS[i * 2 - 1], KEYS[i * 2]
  local ended = redis.call('HGET', side, 'token') == token
    and not (redis.call('TYPE', lock).ok == 'hash' and redis.call('HEXISTS', lock, installation .. ':' .. token) == 1)
  if ended then redis.call('HDEL', side, 'token') end
  reply[i + 1] = ended and 1 or 0
end
return reply
