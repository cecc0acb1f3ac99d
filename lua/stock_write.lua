-- Decides a batch of STOCK operations, in order, and appends what it accepted to the outbox.
-- keys: meta, outbox, frozen, low, deleted, held, expiry, unfrozen, products...
-- args: epoch, run, seen, deadline, lane, counter, resend, window, generation, batch
-- include: guard, outbox, requests, chunks, sums
-- returns: {'ok', op, now, n before, answer of sums or '', a reason a frozen product of sums, word, values, word, values, ...}, or a refusal of the guard
--
-- KEYS goes on with the products of sums, the other products, the orders, then the buckets of request ids. batch is msgpack
-- {sums or false, names, operations}: sums is what can be decided by its sum (sums.lua), the rest is decided one by one. Where a REQUEST in the
-- sums is not new, nothing is done and 'requests' returned. An operation is
-- {kind, text, items, request or false, low or false, upkeep or false, order or false}: text is what its outbox line begins with, items
-- are places in names with their quantities, order is what orders.lua says. A set that creates is marked new=1: what Postgres may have of the product gives way.
-- upkeep is what only the server itself asks for, each about one product: init {mark, n, low or false, reason or false} ·
-- inbox {mark before, mark, row, reason} · correct and adopt {n, round, reason, units that orders hold} · freeze {n, reason} · unfreeze {}. Their
-- quantities have a sign.
-- Words: 'ok' and one value an item · 'short' item, available · 'absent' item · 'frozen' item, reason · 'corrupt' item ·
-- 'over' item, available · 'moved' · 'known' text · 'stale' · 'ahead' · 'full'; of orders 'told' line · 'stands' state, position, expires,
-- items · 'unknown' · 'nowhere' · 'stuck' key · 'later', and so is all that is behind that.
local FIXED = 8
window, generation = tonumber(window), tonumber(generation)

local head, refusal = enter(meta, outbox, epoch, run, seen, deadline, lane, counter, resend)
if not head then return refusal end
local sums, names, operations = unpack(cmsgpack.unpack(batch))
local place = FIXED + (sums and sums[1] or 0)
local anew = generation > 0 and not generation_fits(head, window, generation) and 'clock'
  or sums and sums[10] and not are_new(head, sums[10], window, generation) and 'requests'
if anew then
  append(head, {})
  return {anew, head.op, head.now}
end

local values, reasons, dirty = {}, {}, {}
local is_any_frozen = redis.call('HLEN', frozen) > 0
local set, summed, answered, reasons_of = {}, nil, '', nil
if sums then
  if is_any_frozen then
    local ids = {}
    for i = 1, sums[1] do ids[i] = string.sub(KEYS[FIXED + i], #'stock:product:' + 1) end
    reasons_of = redis.call('HMGET', frozen, unpack(ids))
    local is_one = false
    for i = 1, #ids do is_one = is_one or reasons_of[i] end
    if not is_one then reasons_of = nil end
  end
  summed, answered = sum_up(head, sums, FIXED, reasons_of, set)
  head.n = head.n + summed.count
end
local reply = {'ok', head.op, head.now, head.first, answered}
if reasons_of then
  for i = 1, sums[1] do
    if reasons_of[i] then reply[#reply + 1] = reasons_of[i] end
  end
end
if #operations == 0 then
  -- Nearly every batch ends here: what follows costs it nothing, nor do the functions there.
  append(head, {}, summed)
  keep_requests(window)
  in_chunks(set, function(...) redis.call('MSET', ...) end)
  return reply
end

-- include here: orders

if #names > 0 then
  local found = redis.call('MGET', unpack(KEYS, place + 1, place + #names))
  for i = 1, #names do
    local word, number = word_of(found[i], KEYS[place + i])
    values[i] = number or (word == '?' and 'corrupt')
  end
  if is_any_frozen then reasons = redis.call('HMGET', frozen, unpack(names)) end
end

local lines, lows, life, freezes, thaws = {}, {}, {}, {}, {}
-- By place: the position at which a person unfroze it last, where that was asked for.
local thawed = {}
local shelf = {names = names, values = values, dirty = dirty, held = {}, keys = {}, set = set, settled = 0}
for i = 1, #names do shelf.keys[i] = KEYS[place + i] end
local marks

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
      if not value and kind ~= 'set' then return say('absent', place) or true end
      if kind == 'decr' and value < items[at + 1] then return say('short', place, value) or true end
      if kind == 'incr' and value + items[at + 1] > TOTAL_MAX then return say('over', place, value) or true end
    end
  end
  return false
end

-- Up to where Redis has the inbox, and which round of the reconciler corrected last, and when.
local function marked()
  if not marks then
    local m = redis.call('HMGET', meta, 'inbox', 'corrected')
    local n, round = string.match(m[2] or '', '^(%d+):(.*)$')
    marks = {inbox = m[1] or '0:0', n = tonumber(n) or 0, round = round}
  end
  return marks
end

-- Whether a person has unfrozen it since n: who saw then why it should be frozen has not seen that a person has looked.
local function is_unfrozen_since(i, n)
  if thawed[i] == nil then thawed[i] = tonumber(redis.call('HGET', unfrozen, names[i]) or 0) or 0 end
  return thawed[i] > n
end

local function upkeep_refused(kind, items, upkeep)
  local i, value, quantity = items[1], values[items[1]], items[2]
  if kind == 'inbox' then
    if marked().inbox ~= upkeep[1] then return say('moved') or true end
    return false
  end
  if value == 'corrupt' and kind ~= 'freeze' then return say('corrupt', 1) or true end
  if kind == 'init' then
    if marked().inbox ~= upkeep[1] then return say('moved') or true end
    -- A deletion that Postgres had at n is no longer news to what was read there. One of this very batch is not written down yet.
    local gone = redis.call('HGET', deleted, names[i])
    if value or life[i] == 'deleted' or (gone and tonumber(gone) >= upkeep[2]) then return say('absent', 1) or true end
    if quantity > TOTAL_MAX then return say('over', 1, 0) or true end
    if upkeep[4] and is_unfrozen_since(i, upkeep[2]) then return say('moved') or true end
    return false
  end
  if kind == 'unfreeze' then
    if not value and not reasons[i] then return say('absent', 1) or true end
    return false
  end
  if not value then return say('absent', 1) or true end
  if reasons[i] then return say('frozen', 1, reasons[i]) or true end
  if kind == 'freeze' then
    if is_unfrozen_since(i, upkeep[1]) then return say('moved') or true end
  else
    -- What was compared at n is no longer so where another round has corrected since.
    if marked().n > upkeep[1] and marked().round ~= upkeep[2] then return say('moved') or true end
    if value + quantity > TOTAL_MAX then return say('over', 1, value) or true end
  end
  return false
end

local function keep(operation)
  local kind, text, i, quantity, request, upkeep = operation[1], operation[2], operation[3][1], operation[3][2], operation[4], operation[6]
  local value = values[i]
  local before = value and value ~= 'corrupt' and value or 0
  local after = before
  if kind == 'init' then
    after, life[i], lows[i] = quantity, 'alive', upkeep[3]
    if upkeep[4] then reasons[i], freezes[i] = upkeep[4], upkeep[4] end
  elseif kind == 'inbox' then
    marks.inbox = upkeep[2]
    marks.dirty = true
    local row = upkeep[3]
    if row == 'create' then
      -- What Redis has already was made after it, or filled with it in it.
      if not value then life[i] = 'alive' end
    elseif value and value ~= 'corrupt' then
      after = row == 'delete' and 0 or math.min(before + quantity, TOTAL_MAX)
    end
    if row == 'delete' and reasons[i] then reasons[i], freezes[i] = nil, false end
  elseif kind == 'correct' then
    after = before + quantity
    if upkeep[4] then shelf.held[i] = (shelf.held[i] or 0) + upkeep[4] end
  elseif kind == 'freeze' then
    reasons[i], freezes[i] = upkeep[2], upkeep[2]
  elseif kind == 'unfreeze' then
    reasons[i], freezes[i] = nil, false
    thawed[i], thaws[i] = head.n + #lines + 1, true
  end
  if kind == 'correct' or kind == 'adopt' then
    marks.n, marks.round, marks.dirty = head.n + #lines + 1, upkeep[2], true
  end
  if after < 0 then
    text = string.sub(text, 1, -2) .. 'short=' .. whole(-after) .. ' |'
    reasons[i], freezes[i] = upkeep[#upkeep], upkeep[#upkeep]
    after = 0
  end
  if kind == 'inbox' and value and value ~= 'corrupt' and upkeep[3] == 'delete' then
    values[i], lows[i], life[i], dirty[i] = false, false, 'deleted', true
  elseif after ~= before or kind == 'init' then
    values[i], dirty[i] = after, true
  end
  reply[#reply + 1] = 'ok'
  reply[#reply + 1] = after
  lines[#lines + 1] = text .. ' ' .. names[i] .. ' ' .. whole(after - before) .. ' ' .. whole(after)
  if request then remember(head, request, window, generation, 'OK ' .. head.epoch .. '-' .. whole(head.n + #lines)) end
end

for _, operation in ipairs(operations) do
  local kind, text, items, request = operation[1], operation[2], operation[3], operation[4]
  local word, known
  -- What stands behind it may count on it.
  if shelf.later then
    word = 'later'
  elseif request then
    word, known = recall(head, request, window, generation)
  end
  if word then
    reply[#reply + 1] = word
    if known then reply[#reply + 1] = known end
  elseif operation[6] then
    if not upkeep_refused(kind, items, operation[6]) then keep(operation) end
  elseif operation[7] then
    local position = head.epoch .. '-' .. whole(head.n + #lines + 1)
    local line, answer = decide_order(head, shelf, operation, reply, refused, position)
    if line then
      lines[#lines + 1] = line
      say('told', line)
      if request and answer then remember(head, request, window, generation, answer .. ' ' .. position) end
    end
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
if next(thaws) then redis.call('HLEN', unfrozen) end
local after = held_afterwards(shelf, held, expiry)
append(head, lines, summed)
keep_requests(window)
if marks and marks.dirty then redis.call('HSET', meta, 'inbox', marks.inbox, 'corrected', whole(marks.n) .. ':' .. (marks.round or '')) end
for i, reason in pairs(freezes) do
  if reason then redis.call('HSET', frozen, names[i], reason) else redis.call('HDEL', frozen, names[i]) end
end
for i in pairs(thaws) do redis.call('HSET', unfrozen, names[i], whole(thawed[i])) end
local gone = {}
for i in pairs(dirty) do
  if values[i] then
    set[#set + 1] = shelf.keys[i]
    set[#set + 1] = whole(values[i])
  else
    gone[#gone + 1] = shelf.keys[i]
  end
end
keep_orders(held, expiry, after)
in_chunks(set, function(...) redis.call('MSET', ...) end)
in_chunks(gone, function(...) redis.call('DEL', ...) end)
for i, threshold in pairs(lows) do
  if threshold then redis.call('HSET', low, names[i], whole(threshold)) else redis.call('HDEL', low, names[i]) end
end
for i, state in pairs(life) do
  if state == 'alive' then redis.call('HDEL', deleted, names[i]) else redis.call('HSET', deleted, names[i], whole(head.first)) end
end
return reply
