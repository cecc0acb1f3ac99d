-- Reads what STOCK.INFO shows, at one position.
-- keys: meta, outbox, held, frozen, low, product
-- args: name, applied
-- flags: readonly
-- returns: {available, held, low, frozen, position, age in ms of the oldest change that is not applied yet}
local time = redis.call('TIME')
local position = redis.call('HGET', meta, 'id')
local available = redis.call('TYPE', product).ok == 'string' and redis.call('GET', product)
local waiting, age = redis.call('XRANGE', outbox, '(' .. applied, '+', 'COUNT', 1)[1], 0
if waiting then
  local fields = waiting[2]
  for i = 1, #fields, 2 do
    if fields[i] == 'at' then age = math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(fields[i + 1])) end
  end
end
return {available, redis.call('HGET', held, name), redis.call('HGET', low, name), redis.call('HGET', frozen, name), position, age}
