-- Carries out what a rebuild removes and sets, as long as this partition still is being filled under this epoch: a sidecar that was stopped
-- and replaced may go on, but nothing of it happens.
-- keys: meta, touched...
-- args: epoch, commands
-- returns: how many keys were removed, or 'moved'
--
-- commands is msgpack: {{name, places of its keys in KEYS, arguments}, ...}.
local found = redis.call('HMGET', meta, 'epoch', 'state')
if found[1] ~= epoch or found[2] ~= 'rebuild' then return 'moved' end
local removed = 0
for _, command in ipairs(cmsgpack.unpack(commands)) do
  local name, places, rest = unpack(command)
  local words = {name}
  for _, place in ipairs(places) do words[#words + 1] = KEYS[place] end
  for _, word in ipairs(rest) do words[#words + 1] = word end
  if name == 'UNLINK' then
    removed = removed + redis.call(unpack(words))
  elseif name ~= 'RENAME' or redis.call('EXISTS', words[2]) == 1 then
    redis.call(unpack(words))
  end
end
return removed
