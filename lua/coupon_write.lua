-- Decides a batch of COUPON operations, in order, and appends what it accepted to the outbox.
-- keys: meta, outbox, coupons...
-- args: epoch, run, seen, deadline, lane, counter, resend, window, generation, batch
-- include: guard, outbox, requests
-- returns: {'ok', op, now, n before, word, values, word, values, ...}, or a refusal of the guard
--
-- KEYS goes on with lock, info and users of each coupon, then the buckets of request ids. batch is msgpack
-- {names, users of each coupon, operations}; an operation is {kind, text, coupon, request or false, ...}: create goes on with total,
-- peruser, start, end (0: none), issue with the user. A user's field holds one line a coupon of theirs: serial, state, issued at, order.
-- An issue goes ahead only while nobody holds the coupon's lock: the lock is elided, and excludes all the same.
-- Words: create 'ok' · 'exists'; issue 'ok' serial, remaining · 'already' serial · 'soldout' · 'early' start · 'ended' end ·
-- 'absent' · 'locked' holder, remaining ms; 'corrupt' · 'known' text · 'stale' · 'ahead' · 'full'.
local FIXED = 2
window, generation = tonumber(window), tonumber(generation)

local head, refusal = enter(meta, outbox, epoch, run, seen, deadline, lane, counter, resend)
if not head then return refusal end
local names, users, operations = unpack(cmsgpack.unpack(batch))
if generation > 0 and not generation_fits(head, window, generation) then return {'clock', head.op, head.now} end

local coupons = {}
for c = 1, #names do
  local lock_key, info_key, users_key = KEYS[FIXED + c * 3 - 2], KEYS[FIXED + c * 3 - 1], KEYS[FIXED + c * 3]
  local coupon = {info_key = info_key, users_key = users_key, held = {}, fresh = {}}
  local lock_type, info_type, users_type = redis.call('TYPE', lock_key).ok, redis.call('TYPE', info_key).ok, redis.call('TYPE', users_key).ok
  coupon.corrupt = (lock_type ~= 'none' and lock_type ~= 'hash') or (info_type ~= 'none' and info_type ~= 'hash')
    or (users_type ~= 'none' and users_type ~= 'hash')
  if not coupon.corrupt then
    if lock_type == 'hash' then
      coupon.holder = redis.call('HKEYS', lock_key)[1]
      coupon.holder_ms = redis.call('PTTL', lock_key)
    end
    coupon.exists = info_type == 'hash'
    if coupon.exists then
      local info = redis.call('HMGET', info_key, 'total', 'issued', 'serial', 'peruser', 'start', 'end')
      for i = 1, 6 do
        info[i] = string.find(info[i] or '', '^%d+$') and tonumber(info[i])
        if not info[i] then coupon.corrupt = true end
      end
      coupon.total, coupon.issued, coupon.serial, coupon.per_user, coupon.start, coupon.stop = unpack(info)
    end
    if #users[c] > 0 then
      local lines = redis.call('HMGET', users_key, unpack(users[c]))
      for i, user in ipairs(users[c]) do
        if not coupon.held[user] then
          local held = {text = lines[i] or nil, count = 0}
          if held.text then
            held.count = select(2, string.gsub(held.text, '\n', '')) + 1
            held.last = tonumber(string.match(held.text, '^.*\n(%d+) ') or string.match(held.text, '^(%d+) '))
            if not held.last then coupon.corrupt = true end
          end
          coupon.held[user] = held
        end
      end
    end
  end
  coupons[c] = coupon
end

local reply, lines, dirty = {'ok', head.op, head.now, head.n}, {}, {}

local function say(...)
  for _, value in ipairs({...}) do reply[#reply + 1] = value end
end

local function accept(c, line, request, answer)
  lines[#lines + 1] = line
  dirty[c] = true
  if request then
    remember(head, request, window, generation, answer .. ' ' .. head.epoch .. '-' .. whole(head.n + #lines))
  end
end

local function create(c, coupon, operation)
  if coupon.exists then return say('exists') end
  coupon.exists, coupon.created, coupon.issued, coupon.serial = true, true, 0, 0
  coupon.total, coupon.per_user, coupon.start, coupon.stop = unpack(operation, 5, 8)
  say('ok')
  accept(c, operation[2], operation[4], 'OK')
end

local function issue(c, coupon, operation)
  local user = operation[5]
  local held = coupon.held[user]
  if coupon.holder then return say('locked', coupon.holder, coupon.holder_ms) end
  if not coupon.exists then return say('absent') end
  if head.now < coupon.start then return say('early', coupon.start) end
  if coupon.stop > 0 and head.now >= coupon.stop then return say('ended', coupon.stop) end
  if held.count >= coupon.per_user then return say('already', held.last) end
  if coupon.issued >= coupon.total then return say('soldout') end
  coupon.issued, coupon.serial = coupon.issued + 1, coupon.serial + 1
  local serial, remaining = whole(coupon.serial), whole(coupon.total - coupon.issued)
  held.count, held.last = held.count + 1, coupon.serial
  local fresh = coupon.fresh[user] or {held.text}
  fresh[#fresh + 1] = serial .. ' issued ' .. whole(head.now) .. ' -'
  coupon.fresh[user] = fresh
  say('ok', coupon.serial, coupon.total - coupon.issued)
  accept(c, operation[2] .. ' serial=' .. serial .. ' remaining=' .. remaining .. ' |', operation[4],
    'ISSUED :' .. serial .. ' :' .. remaining)
end

for _, operation in ipairs(operations) do
  local kind, c, request = operation[1], operation[3], operation[4]
  local word, known
  if request then word, known = recall(head, request, window, generation) end
  if word then
    reply[#reply + 1] = word
    if known then reply[#reply + 1] = known end
  elseif coupons[c].corrupt then
    say('corrupt')
  elseif kind == 'create' then
    create(c, coupons[c], operation)
  else
    issue(c, coupons[c], operation)
  end
end

append(head, lines)
keep_requests(window)
for c in pairs(dirty) do
  local coupon = coupons[c]
  local info = {'issued', whole(coupon.issued), 'serial', whole(coupon.serial)}
  if coupon.created then
    for _, field in ipairs({'total', whole(coupon.total), 'used', '0', 'peruser', whole(coupon.per_user), 'start', whole(coupon.start),
      'end', whole(coupon.stop)}) do info[#info + 1] = field end
  end
  redis.call('HSET', coupon.info_key, unpack(info))
  local fields = {}
  for user, lines_of_user in pairs(coupon.fresh) do
    fields[#fields + 1] = user
    fields[#fields + 1] = table.concat(lines_of_user, '\n')
  end
  if #fields > 0 then redis.call('HSET', coupon.users_key, unpack(fields)) end
end
return reply
