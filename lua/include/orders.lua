-- Orders: units that are held for a while, then sold or given back.
--
-- include: whole, chunks, sums
--
-- An operation's order is {place in KEYS, id, ttl in ms or 0, looked, items}: items is the text of what it takes, looked is false where Postgres has not been asked for it, '' where it
-- has none, else {state, expires, items, position} of what it has, which counts where Redis has none. A hash at the key has the same four.
--
-- shelf is what the script knows of its products: names and values by number, the changed ones in dirty, held what their held units move
-- by, keys for the products that it finds in an order and not in KEYS (they live in the slot of those that are), and set with what was
-- summed (see sums.lua).
--
-- decide_order says in reply what is not a change, and returns nil; else the outbox line and what a REQUEST is answered again.
local KEPT_FOR = 86400000
-- Products that one batch settles for orders: some milliseconds, which everybody else waits for. The rest comes with the next.
local SETTLED_MAX = 1000
local STATES = {held = true, confirmed = true, cancelled = true, expired = true}
local orders, moved_orders = {}, {}

-- Whether that is '<product> <units> ...'.
local function are_items(text)
  local at, rest = 1, text .. ' '
  repeat
    local _, to = string.find(rest, '^%S+ %d+ ', at)
    at = to and to + 1
  until not at or at > #rest
  return at
end

-- What is known of an order, or 'corrupt' where that is none. Only one that was cancelled before it came has no items.
local function order_of(state, expires, items, position)
  expires = tonumber(expires)
  local is_so = items and (items == '' and state == 'cancelled' or are_items(items))
  if not is_so or not STATES[state] or not expires or not string.match(position or '', '^%d+%-%d+$') then
    return 'corrupt'
  end
  return {state = state, expires = expires, items = items, position = position}
end

local function order_at(order)
  local key, looked = order[1], order[4]
  if orders[key] == nil then
    local m = redis.pcall('HMGET', KEYS[key], 'state', 'expires', 'items', 'position')
    if m.err then
      orders[key] = 'corrupt'
    elseif m[1] or m[2] or m[3] or m[4] then
      orders[key] = order_of(unpack(m, 1, 4))
    else
      orders[key] = false
    end
  end
  if not orders[key] and type(looked) == 'table' then
    orders[key] = order_of(unpack(looked, 1, 4))
  end
  return orders[key]
end

-- The number of a product that an order names.
local function number_of(shelf, product)
  if not shelf.numbers then
    shelf.numbers, shelf.summed = {}, {}
    for i, name in ipairs(shelf.names) do shelf.numbers[name] = i end
    for at = 1, #shelf.set, 2 do shelf.summed[shelf.set[at]] = tonumber(shelf.set[at + 1]) end
  end
  local i = shelf.numbers[product]
  if i then return i end
  i = #shelf.names + 1
  local key = 'stock:product:' .. product
  shelf.names[i], shelf.numbers[product], shelf.keys[i] = product, i, key
  local number = shelf.summed[key]
  if not number then
    local value, word = redis.pcall('GET', key), '?'
    if type(value) ~= 'table' then word, number = word_of(value, key) end
    if word == '?' then number = 'corrupt' end
  end
  shelf.values[i] = number or false
  return i
end

-- What a line says of an order's products when their units come back, or do not, and leave what is held, or do not. nil and a product whose
-- units are no number or would be too many.
local function release(shelf, known, comes_back, leaves)
  local all, units, line = {}, {}, {}
  for product, quantity in string.gmatch(known.items, '(%S+) (%d+)') do
    local i = number_of(shelf, product)
    local value = shelf.values[i]
    if comes_back and (value == 'corrupt' or (value and value + quantity > TOTAL_MAX)) then return nil, product end
    all[#all + 1], units[#units + 1] = i, quantity
  end
  shelf.settled = shelf.settled + #all
  for at, i in ipairs(all) do
    local value, delta = shelf.values[i], 0
    if value == 'corrupt' then value = 0 end
    -- A deleted product gets nothing back.
    if comes_back and value then
      delta = tonumber(units[at])
      value = value + delta
      shelf.values[i], shelf.dirty[i] = value, true
    end
    if leaves then shelf.held[i] = (shelf.held[i] or 0) - units[at] end
    line[#line + 1] = shelf.names[i] .. ' ' .. whole(delta) .. ' ' .. whole(value or 0)
  end
  return ' from=' .. known.state .. ' units=' .. table.concat(units, ',') .. ' | ' .. table.concat(line, ' ')
end

-- What a line says of the products that an order takes.
local function take(shelf, items, is_held)
  local line = {' |'}
  for at = 1, #items, 2 do
    local i, quantity = items[at], items[at + 1]
    local after = shelf.values[i] - quantity
    shelf.values[i], shelf.dirty[i] = after, true
    if is_held then shelf.held[i] = (shelf.held[i] or 0) + quantity end
    local size = #line
    line[size + 1], line[size + 2], line[size + 3] = shelf.names[i], whole(-quantity), whole(after)
  end
  return table.concat(line, ' ')
end

local function become(order, known, state, expires, items, position)
  local key = order[1]
  if not known then
    known = {}
    orders[key] = known
  end
  known.state, known.expires, known.items, known.position = state, expires, items, position
  moved_orders[key] = order[2]
end

local function decide_order(head, shelf, operation, reply, refused, position)
  local kind, text, items, order = operation[1], operation[2], operation[3], operation[7]
  local known = order_at(order)
  local function say(...)
    for _, value in ipairs({...}) do reply[#reply + 1] = value end
  end
  local function stands(state) say('stands', state or known.state, known.position, known.expires, known.items) end
  if known == 'corrupt' then return say('stuck', KEYS[order[1]]) end
  if kind == 'reserve' or kind == 'sell' then
    if known then return stands(known.state == 'held' and known.expires <= head.now and 'expired' or nil) end
    if refused('decr', items) then return end
    local line, named = take(shelf, items, kind == 'reserve'), order[5]
    if kind == 'sell' then
      become(order, known, 'confirmed', 0, named, position)
      local answer = {'OK'}
      for at = 1, #items, 2 do answer[#answer + 1] = ':' .. whole(shelf.values[items[at]]) end
      return text .. line, table.concat(answer, ' ')
    end
    local expires = head.now + order[3]
    become(order, known, 'held', expires, named, position)
    return text .. ' expires=' .. whole(expires) .. line, 'HELD :' .. whole(expires)
  end
  if not known then
    if not order[4] then return say('unknown') end
    if kind ~= 'cancel' then return say('nowhere') end
    become(order, known, 'cancelled', 0, '', position)
    return text .. ' |', 'CANCELLED'
  end
  if kind ~= 'look' and shelf.settled >= SETTLED_MAX then
    shelf.later = true
    return say('later')
  end
  local is_due = known.state == 'held' and known.expires <= head.now
  if kind == 'look' then return stands(is_due and 'expired' or nil) end
  if is_due then
    local line, product = release(shelf, known, true, true)
    if not line then return say('stuck', 'stock:product:' .. product) end
    become(order, known, 'expired', known.expires, known.items, position)
    return string.match(text, '^%d+') .. ' expire order=' .. order[2] .. line
  end
  if known.state == 'held' and kind == 'extend' then
    local expires = head.now + order[3]
    local line = release(shelf, known, false, false)
    become(order, known, 'held', expires, known.items, position)
    return text .. ' expires=' .. whole(expires) .. line, 'HELD :' .. whole(expires)
  end
  if known.state == 'held' and kind == 'confirm' then
    local line = release(shelf, known, false, true)
    become(order, known, 'confirmed', known.expires, known.items, position)
    return text .. line, 'CONFIRMED'
  end
  if kind == 'cancel' and (known.state == 'held' or known.state == 'confirmed') then
    local line, product = release(shelf, known, true, known.state == 'held')
    if not line then return say('stuck', 'stock:product:' .. product) end
    become(order, known, 'cancelled', known.expires, known.items, position)
    return text .. line, 'CANCELLED'
  end
  return stands()
end

-- What is held afterwards, by product. Reads, so that nothing can fail once the outbox has been written.
local function held_afterwards(shelf, held, expiry)
  if next(moved_orders) then redis.call('ZCARD', expiry) end
  local numbers, names, after = {}, {}, {}
  for i in pairs(shelf.held) do
    numbers[#numbers + 1], names[#names + 1] = i, shelf.names[i]
  end
  if #names == 0 then return after end
  local at = 0
  in_chunks(names, function(...)
    for _, units in ipairs(redis.call('HMGET', held, ...)) do
      at = at + 1
      after[names[at]] = (tonumber(units) or 0) + shelf.held[numbers[at]]
    end
  end)
  return after
end

local function keep_orders(held, expiry, after)
  local set, gone, due, over = {}, {}, {}, {}
  for name, units in pairs(after) do
    if units ~= 0 then set[#set + 1], set[#set + 2] = name, whole(units) else gone[#gone + 1] = name end
  end
  in_chunks(set, function(...) redis.call('HSET', held, ...) end)
  in_chunks(gone, function(...) redis.call('HDEL', held, ...) end)
  for key, id in pairs(moved_orders) do
    local order = orders[key]
    redis.call('HSET', KEYS[key], 'state', order.state, 'expires', whole(order.expires), 'items', order.items, 'position', order.position)
    if order.state == 'held' then
      due[#due + 1], due[#due + 2] = whole(order.expires), id
    else
      over[#over + 1] = id
      redis.call('PEXPIRE', KEYS[key], KEPT_FOR)
    end
  end
  if #due > 0 then redis.call('ZADD', expiry, unpack(due)) end
  if #over > 0 then redis.call('ZREM', expiry, unpack(over)) end
end
