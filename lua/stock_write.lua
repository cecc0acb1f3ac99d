-- Decides a batch of STOCK operations, in order, and appends what it accepted to the outbox.
-- keys: meta, outbox, frozen, low, deleted, products...
-- args: epoch, run, seen, deadline, lane, counter, resend, window, generation, batch
-- include: guard, outbox, requests
-- returns: {'ok', op, now, n before, word, values, word, values, ...}, or a refusal of the guard
--
-- KEYS goes on with the products, then the buckets of request ids. batch is msgpack {names, operations}; an operation is
-- {kind, text, items, request or false, low or false}: text is what its outbox line begins with, items are places in names with their
-- quantities. A set that creates is marked new=1: what Postgres may have of the product gives way. Words: 'ok' and one value an item · 'short' item, available · 'absent' item · 'frozen' item, reason ·
-- 'corrupt' item · 'over' item, available · 'known' text · 'stale' · 'ahead' · 'full'.
local TOTAL_MAX = 9007199254740991
local FIXED = 5
window, generation = tonumber(window), tonumber(generation)

local head, refusal = enter(meta, outbox, epoch, run, seen, deadline, lane, counter, resend)
if not head then return refusal end
local names, operations = unpack(cmsgpack.unpack(batch))
if generation > 0 and not generation_fits(head, window, generation) then return {'clock', head.op, head.now} end

local values, reasons, dirty = {}, {}, {}
local found = redis.call('MGET', unpack(KEYS, FIXED + 1, FIXED + #names))
for i = 1, #names do
  local value = found[i]
  if value then
    local number = string.find(value, '^%d+$') and tonumber(value)
    values[i] = number and number <= TOTAL_MAX and number or 'corrupt'
  elseif redis.call('TYPE', KEYS[FIXED + i]).ok == 'none' then
    values[i] = false
  else
    values[i] = 'corrupt'
  end
end
if redis.call('HLEN', frozen) > 0 then reasons = redis.call('HMGET', frozen, unpack(names)) end

local reply, lines, lows, life = {'ok', head.op, head.now, head.n}, {}, {}, {}

local function say(...)
  for _, value in ipairs({...}) do reply[#reply + 1] = value end
end

local function refused(kind, items)
  for at = 1, #items, 2 do
    local i = items[at]
    local value, place = values[i], (at + 1) / 2
    if value == 'corrupt' then return say('corrupt', place) or true end
    if kind ~= 'get' then
      if reasons[i] then return say('frozen', place, reasons[i]) or true end
      if not value and kind ~= 'set' and kind ~= 'init' then return say('absent', place) or true end
      if kind == 'decr' and value < items[at + 1] then return say('short', place, value) or true end
      if kind == 'init' and items[at + 1] > TOTAL_MAX then return say('corrupt', place) or true end
      if kind == 'incr' and value + items[at + 1] > TOTAL_MAX then return say('over', place, value) or true end
      if kind == 'init' and (value or redis.call('HEXISTS', deleted, names[i]) == 1) then return say('absent', place) or true end
    end
  end
  return false
end

for _, operation in ipairs(operations) do
  local kind, text, items, request = operation[1], operation[2], operation[3], operation[4]
  local word, known
  if request then word, known = recall(head, request, window, generation) end
  if word then
    reply[#reply + 1] = word
    if known then reply[#reply + 1] = known end
  elseif not refused(kind, items) then
    reply[#reply + 1] = 'ok'
    if kind == 'get' then
      for at = 1, #items, 2 do reply[#reply + 1] = values[items[at]] end
    else
      if kind == 'set' and not values[items[1]] then text = string.sub(text, 1, -2) .. 'new=1 |' end
      local line, answer = {text}, {'OK'}
      for at = 1, #items, 2 do
        local i, quantity = items[at], items[at + 1]
        local before = values[i] or 0
        local after
        if kind == 'decr' then after = before - quantity
        elseif kind == 'incr' then after = before + quantity
        elseif kind == 'delete' then after = 0
        else after = quantity end
        line[#line + 1] = names[i]
        line[#line + 1] = whole(after - before)
        line[#line + 1] = whole(after)
        if kind == 'delete' then
          values[i] = false
          lows[i] = false
          life[i] = 'deleted'
        else
          if not values[i] then life[i] = 'alive' end
          values[i] = after
          answer[#answer + 1] = ':' .. whole(after)
        end
        reply[#reply + 1] = after
        dirty[i] = true
        if operation[5] then lows[i] = operation[5] end
      end
      lines[#lines + 1] = table.concat(line, ' ')
      if request then
        answer[#answer + 1] = head.epoch .. '-' .. whole(head.n + #lines)
        remember(head, request, window, generation, table.concat(answer, ' '))
      end
    end
  end
end

-- A hash of another type must fail before the first write, not after it.
if next(lows) then redis.call('HLEN', low) end
if next(life) then redis.call('HLEN', deleted) end
append(head, lines)
keep_requests(window)
local set, gone = {}, {}
for i in pairs(dirty) do
  if values[i] then
    set[#set + 1] = KEYS[FIXED + i]
    set[#set + 1] = whole(values[i])
  else
    gone[#gone + 1] = KEYS[FIXED + i]
  end
end
if #set > 0 then redis.call('MSET', unpack(set)) end
if #gone > 0 then redis.call('DEL', unpack(gone)) end
for i, threshold in pairs(lows) do
  if threshold then redis.call('HSET', low, names[i], whole(threshold)) else redis.call('HDEL', low, names[i]) end
end
for i, state in pairs(life) do
  if state == 'alive' then redis.call('HDEL', deleted, names[i]) else redis.call('HSET', deleted, names[i], whole(head.n)) end
end
return reply
