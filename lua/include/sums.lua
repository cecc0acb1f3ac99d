-- Decides the operations that can be summed up a product: each takes or gives units of one product, and nothing else of the batch is
-- about that product. Where the sum fits, all of them do, in any order: one comparison a product decides them.
--
-- sums is {products, changing, downs, ups or false, leasts, count, text, each, ks or false, asked or false}. KEYS has the products from place on, first
-- those that change, in the order in which text mentions them, then those that are only read. downs and ups are the units wanted and
-- given, a product; least is the smallest quantity that is taken where nothing is given, else 0. text has a line an operation, count of them, in
-- the order of arrival, without what is available afterwards: before, what was available before the entry, stands for it, one
-- number a product in the order of first mention. each is msgpack {place, quantity, ...} of the operations, unpacked only where sums do
-- not fit. With ks, msgpack of the operations' places in the batch, text has a line a product instead, in the order of the products, as
-- src/domain/runs.rs says. asked is what carries a REQUEST, all of it new, by bucket as requests.lua has it: {id, digest, place in each, the
-- product's place, by how much all up to it move the product, ...}.
--
-- include: whole, requests
--
-- Returns the lines that were accepted {count, text, before}, and the answer for all: how many were accepted, and a word a product: what
-- was available, - where there is none, ? where it is no number, with ! in front of what is frozen. The sidecar works
-- out every reply from that by the rule that stands in one_by_one. New values go into set, as MSET takes them.
local TOTAL_MAX = 9007199254740991

-- What a product's value comes to: a word for the answer, and its number if it is one.
local function word_of(value, key)
  local number = value and string.find(value, '^%d+$') and tonumber(value)
  if number and number <= TOTAL_MAX then return value, number end
  if value or redis.call('TYPE', key).ok ~= 'none' then return '?' end
  return '-'
end

-- The operation at place k goes into the line of its product.
local function take_in(line, k, quantity)
  line.total = line.total + quantity
  if quantity < 0 then line.down = true else line.up = true end
  local runs = line.runs
  local run = runs[#runs]
  if run and run[2] == k - 1 and run[3] == quantity then
    run[2] = k
  else
    runs[#runs + 1] = {k, k, quantity}
  end
end

local function line_of_product(line, key)
  local runs = line.runs
  local first = runs[1]
  local kind = line.down and line.up and ' mixed' or line.up and ' incr' or ' decr'
  local text = whole(first[1]) .. kind
  if #runs > 1 or first[2] > first[1] then
    local parts = {}
    for at, run in ipairs(runs) do
      local ks = whole(run[1])
      if run[2] > run[1] then ks = ks .. '-' .. whole(run[2]) end
      parts[at] = ks .. ':' .. whole(run[3])
    end
    text = text .. ' runs=' .. table.concat(parts, ',')
  end
  return text .. ' | ' .. string.sub(key, #'stock:product:' + 1) .. ' ' .. whole(line.total)
end

-- What a REQUEST is remembered with: what was available after it, as the count-th of those that are summed.
local function remember_sum(head, current, id, digest, after, count)
  remember_in(current, id, digest .. ' OK :' .. whole(after) .. ' ' .. head.epoch .. '-' .. whole(head.first + count))
end

local function one_by_one(head, sums, numbers, words, place, set)
  local _, changing, _, _, leasts, _, text, each, ks, asked = unpack(sums)
  local asked_at = {}
  for _, bucket in ipairs(asked or {}) do
    local all = bucket[4]
    for at = 1, #all, 5 do asked_at[all[at + 2]] = {bucket[5], all[at], all[at + 1]} end
  end
  local undecided = false
  for i = 1, changing do
    if numbers[i] and numbers[i] >= leasts[i] then undecided = true end
  end
  local values, mentioned, before, lines, count = {}, {}, {}, {}, 0
  if undecided then
    each = cmsgpack.unpack(each)
    ks = ks and cmsgpack.unpack(ks)
    local line_after = not ks and string.gmatch(text, '[^\n]+')
    for at = 1, #each / 2 do
      local i, quantity = each[at * 2 - 1], each[at * 2]
      local line = line_after and line_after()
      local value = values[i] or numbers[i]
      if value then
        local after = value + quantity
        if after >= 0 and after <= TOTAL_MAX then
          values[i] = after
          count = count + 1
          if not mentioned[i] then
            mentioned[i] = ks and {total = 0, runs = {}} or true
            if not ks then before[#before + 1] = words[i] end
          end
          local request = asked_at[at]
          if request then remember_sum(head, request[1], request[2], request[3], after, count) end
          if ks then take_in(mentioned[i], ks[at], quantity) else lines[#lines + 1] = line end
        end
      end
    end
    for i = 1, ks and changing or 0 do
      if mentioned[i] then
        lines[#lines + 1] = line_of_product(mentioned[i], KEYS[place + i])
        before[#before + 1] = words[i]
      end
    end
  end
  for i, value in pairs(values) do
    set[#set + 1] = KEYS[place + i]
    set[#set + 1] = value
  end
  return {count = count, text = table.concat(lines, '\n'), before = table.concat(before, ' ')}
end

local function sum_up(head, sums, place, frozen, set)
  local products, changing, downs, ups, leasts, count, text, _, _, asked = unpack(sums)
  local found = redis.call('MGET', unpack(KEYS, place + 1, place + products))
  local all = not frozen
  if all then
    for i = 1, changing do
      local value = tonumber(found[i])
      local after = value and value - downs[i]
      if not after or after < 0 or value > TOTAL_MAX then
        all = false
        break
      end
      if ups then
        after = after + ups[i]
        if value + ups[i] > TOTAL_MAX then
          all = false
          break
        end
      end
      set[i * 2 - 1] = KEYS[place + i]
      set[i * 2] = after
    end
  end
  local before = all and table.concat(found, ' ', 1, changing)
  -- tonumber is not strict. A blank of a value's own stands beside another one, or at an end.
  local strict = all and not string.find(before, '[^%d ]') and not string.find(before, '  ', 1, true)
    and string.byte(before, 1) ~= 32 and string.byte(before, -1) ~= 32
  if strict then
    local answer = whole(count) .. ' ' .. before
    if changing < products then
      if changing == 0 then answer = '0' end
      for i = changing + 1, products do answer = answer .. ' ' .. word_of(found[i], KEYS[place + i]) end
    end
    for _, bucket in ipairs(asked or {}) do
      local all, current = bucket[4], bucket[5]
      for at = 1, #all, 5 do remember_sum(head, current, all[at], all[at + 1], found[all[at + 3]] + all[at + 4], all[at + 2]) end
    end
    return {count = count, text = text, before = before}, answer
  end
  for i = #set, 1, -1 do set[i] = nil end
  local numbers, words = {}, {}
  for i = 1, products do
    local word, number = word_of(found[i], KEYS[place + i])
    if frozen and frozen[i] then word, number = '!' .. word, nil end
    words[i], numbers[i] = word, number
  end
  local summed = one_by_one(head, sums, numbers, words, place, set)
  return summed, whole(summed.count) .. ' ' .. table.concat(words, ' ')
end
