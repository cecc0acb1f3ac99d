-- Decides a batch of COUPON operations, in order, and appends what it accepted to the outbox.
-- keys: meta, outbox, coupons...
-- args: epoch, run, seen, deadline, lane, counter, resend, window, generation, batch
-- include: guard, outbox, requests
-- returns: {'ok', op, now, n before, word, values, word, values, ...}, or a refusal of the guard
--
-- KEYS goes on with lock, info and users of each coupon, then the buckets of request ids. batch is msgpack {holder of each coupon, users of each
-- coupon, operations}; an operation is {kind, text, coupon, request or false, ...}: create goes on with total, peruser, start, end (0: none),
-- whether Postgres is known not to have it either, alter with total, start, end (false: as it is) and, like delete, whether an issue of the same
-- client stands in front of it, init with total, peruser, start, end, issued, used, serial, whether it is deleted, {user, lines, ...}, and 0 where
-- that is all of it, -1 where it is a piece, which is kept aside for a minute, else how many users were given so before; correct and adopt with n,
-- round, and by how much total, issued, used and serial move, freeze with the reason, thaw with nothing, keep with a serial, the others with the
-- serial (0: the one that fits), the order (=<order>, - for none) and false, or of what was answered before Redis lost its data up to which serial
-- Postgres knows who has it: then it is decided as if it were then, an issue has its serial of then, and the order of an unuse is that of the
-- redemption that it takes back, '' where there is none that it may; and whether an alter or delete of the same client stands in front of it that
-- has an issue in front of it. An issue without a request, of which there are most, is only its coupon and its text, without a table around them.
-- The users of a coupon are those of its operations, in their order. A user's field holds one line a coupon of theirs, by serial: serial, state,
-- issued at, order. What was revoked is nobody's any more.
-- The holder is the field in the coupon's lock that its issues go by, which has to be there; '': the lock is elided, and they go ahead only while
-- nobody holds it.
-- Words: 'more' and of how many issues behind one that was accepted: each has the next serial and one less left. 'ok', to alter with remaining, to
-- the others with serial, remaining; create 'exists'; alter 'few' issued · 'order'; issue 'already' serial · 'soldout' · 'early' start · 'ended'
-- end · 'locked' holder, remaining ms · 'fenced'; what comes behind one of the last two and is of its user, or of its client and of no user,
-- 'behind'; all behind an init of several parts 'loading'; use 'already' serial · 'none' · 'ended'; unuse 'unused' · 'none'; revoke 'used' serial
-- · 'none'; correct, adopt and what is done again 'moved'; keep 'exists'; all of them 'absent' · 'deleted' · 'corrupt' · 'frozen' reason · 'known'
-- text · 'stale' · 'ahead' · 'full'.
local FIXED = 2
window, generation = tonumber(window), tonumber(generation)

local head, refusal = enter(meta, outbox, epoch, run, seen, deadline, lane, counter, resend)
if not head then return refusal end
local holders, users, operations = unpack(cmsgpack.unpack(batch))
if generation > 0 and not generation_fits(head, window, generation) then
  append(head, {})
  return {'clock', head.op, head.now}
end

local coupons = {}
for c = 1, #holders do
  local lock_key, info_key, users_key = KEYS[FIXED + c * 3 - 2], KEYS[FIXED + c * 3 - 1], KEYS[FIXED + c * 3]
  local coupon = {info_key = info_key, users_key = users_key, held = {}, users = users[c], at = 0, single = {}, fields = {}, singles = 0,
    waiting = {}}
  local lock_type, info_type, users_type = redis.call('TYPE', lock_key).ok, redis.call('TYPE', info_key).ok, redis.call('TYPE', users_key).ok
  coupon.corrupt = (lock_type ~= 'none' and lock_type ~= 'hash') or (info_type ~= 'none' and info_type ~= 'hash')
    or (users_type ~= 'none' and users_type ~= 'hash')
  if not coupon.corrupt then
    if holders[c] ~= '' then
      coupon.fenced = lock_type == 'none' or redis.call('HEXISTS', lock_key, holders[c]) == 0
    elseif lock_type == 'hash' then
      coupon.holder = redis.call('HKEYS', lock_key)[1]
      coupon.holder_ms = redis.call('PTTL', lock_key)
    end
    coupon.exists = info_type == 'hash'
    if coupon.exists then
      local info = redis.call('HMGET', info_key, 'total', 'issued', 'serial', 'peruser', 'start', 'end', 'used', 'state', 'frozen')
      for i = 1, 7 do
        info[i] = string.find(info[i] or '', '^%d+$') and tonumber(info[i])
        if not info[i] then coupon.corrupt = true end
      end
      coupon.total, coupon.issued, coupon.serial, coupon.per_user, coupon.start, coupon.stop, coupon.used = unpack(info, 1, 7)
      coupon.deleted, coupon.frozen = info[8] == 'deleted', info[9]
    end
    if #users[c] > 0 then coupon.lines = redis.call('HMGET', users_key, unpack(users[c])) end
    for i, text in ipairs(coupon.lines or {}) do
      if text and not (string.find(text, '^%d+ ') or string.find(text, '\n%d+ [^\n]*$')) then coupon.corrupt = true end
    end
  end
  coupons[c] = coupon
end

local reply, lines, dirty = {'ok', head.op, head.now, head.n}, {}, {}
local said, accepted = 4, 0
local since = ' issued ' .. whole(head.now) .. ' -'

local function say(word, first, second)
  said = said + 1
  reply[said] = word
  if first ~= nil then
    said = said + 1
    reply[said] = first
  end
  if second ~= nil then
    said = said + 1
    reply[said] = second
  end
end

local function accept(c, line, request, answer)
  accepted = accepted + 1
  lines[accepted] = line
  dirty[c] = true
  if request then
    remember(head, request, window, generation, answer .. ' ' .. head.epoch .. '-' .. whole(head.n + accepted))
  end
end

-- The user of the next operation of this coupon, and the place of what Redis has of theirs.
local function next_user(coupon)
  coupon.at = coupon.at + 1
  return coupon.users[coupon.at], coupon.at
end

-- What a user has, with what this batch has issued to them.
local function held_by(coupon, user, at)
  local held = coupon.held[user]
  if held then return held end
  local text = coupon.single[user] or coupon.lines[at] or nil
  held = {text = text, count = 0}
  if text then
    held.count = select(2, string.gsub(text, '\n', '')) + 1
    held.last = tonumber(string.match(text, '^.*\n(%d+) ') or string.match(text, '^(%d+) '))
  end
  coupon.held[user] = held
  return held
end

-- A user's lines, each in its words: only what looks into them needs that, an issue adds one at the end.
local function rows_of(held)
  if held.rows then return held.rows end
  local rows, text = {}, held.text
  if held.fresh then text = table.concat(held.fresh, '\n') end
  for line in string.gmatch(text or '', '[^\n]+') do
    local serial, state, at, order = string.match(line, '^(%d+) (%S+) (%d+) (%S+)$')
    if not serial then return nil end
    rows[#rows + 1] = {serial = serial, state = state, at = at, order = order}
  end
  held.rows = rows
  return rows
end

local function add_line(held, serial)
  if held.rows then
    held.rows[#held.rows + 1] = {serial = serial, state = 'issued', at = whole(head.now), order = '-'}
  else
    held.fresh = held.fresh or {held.text}
    held.fresh[#held.fresh + 1] = serial .. since
  end
  held.count, held.last, held.changed = held.count + 1, tonumber(serial), true
end

local function remaining_of(coupon)
  return math.max(coupon.total - coupon.issued, 0)
end

local kinds = {}

function kinds.create(c, coupon, operation)
  if coupon.exists then return say('exists') end
  if not operation[9] then return say('absent') end
  coupon.exists, coupon.created, coupon.issued, coupon.serial, coupon.used = true, true, 0, 0, 0
  -- What its users have under a key that was left is nobody's.
  coupon.lines, coupon.emptied = {}, true
  coupon.total, coupon.per_user, coupon.start, coupon.stop = unpack(operation, 5, 8)
  say('ok')
  accept(c, operation[2], operation[4], 'OK')
end

local pieces, dropped = {}, {}

-- Gives Redis what Postgres has of a coupon. Nothing moves, so the outbox is not told.
function kinds.init(c, coupon, operation)
  if coupon.exists then return say('exists') end
  local part, aside = operation[14], coupon.users_key .. '{loading}'
  if part < 0 then
    local kind = redis.call('TYPE', aside).ok
    if kind ~= 'none' and kind ~= 'hash' then dropped[#dropped + 1] = aside end
    pieces[#pieces + 1] = {aside, operation[13]}
    return say('ok')
  end
  if part > 0 then
    -- Whoever else loads it gives the same. What was left of an earlier time may be more, or have ended meanwhile.
    if redis.pcall('HLEN', aside) ~= part then
      dropped[#dropped + 1] = aside
      return say('absent')
    end
    -- What its users have was not read.
    coupon.aside, coupon.waits = aside, 'loading'
  end
  coupon.exists, coupon.created, coupon.emptied = true, true, true
  coupon.total, coupon.per_user, coupon.start, coupon.stop, coupon.issued, coupon.used, coupon.serial = unpack(operation, 5, 11)
  coupon.deleted, coupon.gone = operation[12], operation[12]
  coupon.lines, coupon.fields, coupon.singles = {}, operation[13], #operation[13]
  for i = 1, coupon.singles, 2 do coupon.single[operation[13][i]] = operation[13][i + 1] end
  dirty[c] = true
  say('ok')
end

function kinds.alter(c, coupon, operation)
  local total, start, stop = operation[5] or coupon.total, operation[6] or coupon.start, operation[7] or coupon.stop
  if operation[5] and total < coupon.issued then return say('few', coupon.issued) end
  if (operation[6] or operation[7]) and stop > 0 and stop <= start then return say('order') end
  local by = total - coupon.total
  coupon.total, coupon.start, coupon.stop, coupon.altered = total, start, stop, true
  say('ok', remaining_of(coupon))
  accept(c, operation[2] .. ' remaining=' .. whole(remaining_of(coupon)) .. ' by=' .. whole(by) .. ' |', operation[4], 'OK')
end

-- The reconciler's newest correction: n and round.
local corrected

local function mend(c, coupon, operation, moves)
  local n, round, total, issued, used, serial = unpack(operation, 5, 10)
  if not corrected then
    local at, by = string.match(redis.call('HGET', meta, 'corrected') or '', '^(%d+):(.*)$')
    corrected = {n = tonumber(at) or 0, round = by}
  end
  -- What was compared at n is no longer so where another round has corrected since.
  if corrected.n > n and corrected.round ~= round then return say('moved') end
  if moves then
    local after = {coupon.total + total, coupon.issued + issued, coupon.used + used, coupon.serial + serial}
    if math.min(unpack(after)) < 0 then return say('moved') end
    coupon.total, coupon.issued, coupon.used, coupon.serial = unpack(after)
    coupon.altered = true
  end
  corrected = {n = head.n + accepted + 1, round = round, dirty = true}
  say('ok', remaining_of(coupon))
  accept(c, operation[2] .. ' remaining=' .. whole(remaining_of(coupon)) .. ' |')
end

function kinds.correct(c, coupon, operation) return mend(c, coupon, operation, true) end

function kinds.adopt(c, coupon, operation) return mend(c, coupon, operation, false) end

-- A serial that was answered before Redis lost its data is not given out again: the next one is above it, as in Postgres.
function kinds.keep(c, coupon, operation)
  local by = operation[5] - coupon.serial
  if by <= 0 then return say('exists') end
  coupon.serial = operation[5]
  -- Who compared before this compares anew.
  corrected = {n = head.n + accepted + 1, round = 'keep', dirty = true}
  say('ok', remaining_of(coupon))
  accept(c, operation[2] .. ' total=0 issued=0 used=0 serial=' .. whole(by) .. ' remaining=' .. whole(remaining_of(coupon)) .. ' |')
end

-- Nothing moves by these two, so the outbox is not told.
function kinds.freeze(c, coupon, operation)
  coupon.frozen, coupon.noted, dirty[c] = operation[5], true, true
  say('ok')
end

function kinds.thaw(c, coupon)
  coupon.frozen, coupon.noted, dirty[c] = false, true, true
  say('ok')
end

function kinds.delete(c, coupon, operation)
  coupon.deleted, coupon.held, coupon.gone, coupon.singles, coupon.fields = true, {}, true, 0, {}
  say('ok')
  accept(c, operation[2], operation[4], 'OK')
end

local function stepped(c, coupon, operation, serial, word)
  local remaining = remaining_of(coupon)
  say('ok', tonumber(serial), remaining)
  accept(c, operation[2] .. ' serial=' .. serial .. ' remaining=' .. whole(remaining) .. ' |', operation[4], word)
end

function kinds.issue(c, coupon, operation, held, user)
  if coupon.fenced or coupon.holder then
    coupon.waiting[user] = true
    if coupon.fenced then return say('fenced') end
    return say('locked', coupon.holder, coupon.holder_ms)
  end
  local again = operation[7] and operation[5]
  if again and again > operation[7] and again <= coupon.serial then return say('moved') end
  if not again and head.now < coupon.start then return say('early', coupon.start) end
  if not again and coupon.stop > 0 and head.now >= coupon.stop then return say('ended', coupon.stop) end
  if held.count >= coupon.per_user then return say('already', held.last) end
  if coupon.issued >= coupon.total then return say('soldout') end
  if again and not rows_of(held) then return say('corrupt') end
  local number = again or coupon.serial + 1
  coupon.issued, coupon.serial = coupon.issued + 1, math.max(coupon.serial, number)
  local serial = whole(number)
  add_line(held, serial)
  if again then
    table.sort(held.rows, function(a, b) return tonumber(a.serial) < tonumber(b.serial) end)
    held.last = tonumber(held.rows[#held.rows].serial)
  end
  stepped(c, coupon, operation, serial, operation[4] and 'ISSUED :' .. serial .. ' :' .. whole(remaining_of(coupon)))
end

-- Whether nothing but the number left decides about an issue to a user who has none.
local function is_open(coupon)
  return not coupon.corrupt and coupon.exists and not coupon.deleted and not coupon.frozen and not coupon.waits and not coupon.fenced
    and not coupon.holder
    and head.now >= coupon.start and (coupon.stop == 0 or head.now < coupon.stop)
end

-- What was said last, if that was of issues as simple as that.
local run = {}

-- Issues to a user who has none; false where it is not as simple as that.
local function issue_first(c, coupon, user, at, text)
  if not coupon.lines or coupon.lines[at] or coupon.single[user] or coupon.held[user] then return false end
  if coupon.open == nil then coupon.open = is_open(coupon) end
  if not coupon.open or coupon.issued >= coupon.total then return false end
  local number, left = coupon.serial + 1, coupon.total - coupon.issued - 1
  coupon.serial, coupon.issued = number, coupon.issued + 1
  local serial = whole(number)
  local line, singles = serial .. since, coupon.singles
  coupon.single[user] = line
  coupon.fields[singles + 1], coupon.fields[singles + 2] = user, line
  coupon.singles = singles + 2
  accepted = accepted + 1
  lines[accepted] = text .. ' serial=' .. serial .. ' remaining=' .. whole(left) .. ' |'
  dirty[c] = true
  if run.coupon == c and run.said == said then
    if not run.more then
      reply[said + 1], run.more = 'more', said + 2
      said, run.said = said + 2, said + 2
      reply[said] = 0
    end
    reply[said] = reply[said] + 1
    return true
  end
  reply[said + 1], reply[said + 2], reply[said + 3] = 'ok', number, left
  said = said + 3
  run = {coupon = c, said = said}
  return true
end

-- The user's coupon that an operation is about: the one with its serial, else the first or the last in that state. Then whether there is one
-- in the other state, and the last of those.
local function find(rows, serial, state, from_the_front)
  local found, other
  for i, row in ipairs(rows) do
    if serial == 0 or tonumber(row.serial) == serial then
      if row.state ~= state then
        other = row
      elseif not (found and from_the_front) then
        found = i
      end
    end
  end
  return found, other
end

function kinds.use(c, coupon, operation, held)
  local found, used = find(held.rows, operation[5], 'issued', true)
  if not found then
    if used then return say('already', tonumber(used.serial)) end
    return say('none')
  end
  if not operation[7] and coupon.stop > 0 and head.now >= coupon.stop then return say('ended', coupon.stop) end
  local row = held.rows[found]
  row.state, row.order, held.changed, coupon.used = 'used', operation[6], true, coupon.used + 1
  stepped(c, coupon, operation, row.serial, 'USED :' .. row.serial)
end

function kinds.unuse(c, coupon, operation, held)
  local found, issued = find(held.rows, operation[5], 'used')
  if not found then return say(issued and 'unused' or 'none') end
  local row = held.rows[found]
  if operation[7] and row.order ~= operation[6] then return say('moved') end
  row.state, row.order, held.changed, coupon.used = 'issued', '-', true, math.max(coupon.used - 1, 0)
  stepped(c, coupon, operation, row.serial, 'ISSUED :' .. row.serial)
end

function kinds.revoke(c, coupon, operation, held)
  local found, used = find(held.rows, operation[5], 'issued')
  if not found then
    if used then return say('used', tonumber(used.serial)) end
    return say('none')
  end
  local serial = table.remove(held.rows, found).serial
  local last = held.rows[#held.rows]
  held.count, held.last, held.changed = held.count - 1, last and tonumber(last.serial), true
  coupon.issued = math.max(coupon.issued - 1, 0)
  stepped(c, coupon, operation, serial, 'REVOKED :' .. serial .. ' :' .. whole(remaining_of(coupon)))
end

-- Which operations say whether what their client wants of the coupon stands in front of them.
local BEHIND = {alter = true, delete = true, issue = true, use = true, unuse = true, revoke = true}

-- What is done to a frozen coupon, too.
local ALSO_FROZEN = {freeze = true, thaw = true, keep = true, delete = true}

local function decide(operation, user, at)
  local kind, c, request = operation[1], operation[3], operation[4]
  local coupon = coupons[c]
  local word, known
  if request then word, known = recall(head, request, window, generation) end
  if word then return say(word, known) end
  if coupon.corrupt then return say('corrupt') end
  -- It may be of the client whose issue is sent back, and comes behind that again.
  if coupon.waits then return say(coupon.waits) end
  if kind ~= 'issue' and coupon.waiting[user or false] then return say('behind') end
  local behind = operation[8]
  if kind == 'delete' then behind = operation[5] end
  if behind and BEHIND[kind] and next(coupon.waiting) then return say('behind') end
  if kind ~= 'create' and kind ~= 'init' then
    if not coupon.exists then return say('absent') end
    if coupon.deleted then return say('deleted') end
    if coupon.frozen and not ALSO_FROZEN[kind] then return say('frozen', coupon.frozen) end
  end
  if not user then
    coupon.open = nil
    return kinds[kind](c, coupon, operation)
  end
  local held = held_by(coupon, user, at)
  if kind ~= 'issue' and not rows_of(held) then return say('corrupt') end
  return kinds[kind](c, coupon, operation, held, user)
end

local OF_A_USER = {issue = true, use = true, unuse = true, revoke = true}
local place = 1
while operations[place] do
  local operation = operations[place]
  if type(operation) == 'number' then
    local c, text = operation, operations[place + 1]
    local user, at = next_user(coupons[c])
    if not issue_first(c, coupons[c], user, at, text) then decide({'issue', text, c, false}, user, at) end
    place = place + 2
  else
    local user, at
    if OF_A_USER[operation[1]] then user, at = next_user(coupons[operation[3]]) end
    decide(operation, user, at)
    place = place + 1
  end
end

append(head, lines)
keep_requests(window)
if corrected and corrected.dirty then redis.call('HSET', meta, 'corrected', whole(corrected.n) .. ':' .. corrected.round) end
for _, aside in ipairs(dropped) do redis.call('UNLINK', aside) end
for _, piece in ipairs(pieces) do
  redis.call('HSET', piece[1], unpack(piece[2]))
  redis.call('PEXPIRE', piece[1], 60000)
end
for c in pairs(dirty) do
  local coupon = coupons[c]
  local info = {'issued', whole(coupon.issued), 'serial', whole(coupon.serial), 'used', whole(coupon.used)}
  if coupon.created or coupon.altered then
    for _, field in ipairs({'total', whole(coupon.total), 'start', whole(coupon.start), 'end', whole(coupon.stop)}) do info[#info + 1] = field end
  end
  if coupon.created then
    info[#info + 1] = 'peruser'
    info[#info + 1] = whole(coupon.per_user)
  end
  if coupon.gone then
    info[#info + 1] = 'state'
    info[#info + 1] = 'deleted'
    redis.call('UNLINK', coupon.users_key)
  end
  if coupon.emptied then redis.call('UNLINK', coupon.users_key) end
  if coupon.noted and coupon.frozen then
    info[#info + 1] = 'frozen'
    info[#info + 1] = coupon.frozen
  elseif coupon.noted then
    redis.call('HDEL', coupon.info_key, 'frozen')
  end
  if coupon.aside then
    redis.call('RENAME', coupon.aside, coupon.users_key)
    redis.call('PERSIST', coupon.users_key)
  end
  redis.call('HSET', coupon.info_key, unpack(info))
  local fields, count, gone = coupon.fields, coupon.singles, {}
  for user, held in pairs(coupon.held) do
    if held.changed then
      local rows = held.fresh
      if held.rows then
        rows = {}
        for i, row in ipairs(held.rows) do rows[i] = row.serial .. ' ' .. row.state .. ' ' .. row.at .. ' ' .. row.order end
      end
      if #rows > 0 then
        fields[count + 1], fields[count + 2] = user, table.concat(rows, '\n')
        count = count + 2
      else
        gone[#gone + 1] = user
      end
    end
  end
  if count > 0 then redis.call('HSET', coupon.users_key, unpack(fields)) end
  if #gone > 0 then redis.call('HDEL', coupon.users_key, unpack(gone)) end
end
return reply
