-- The one guard of every script that changes something: is this batch new, and may this connection write here?
-- Returns the head that outbox.lua appends under, or nil and the refusal to return. In it first is n before this batch, and n counts
-- what the batch has been granted so far by sums.lua.
-- A refusal, like every reply, begins {status, op, now in ms}: the sidecar compares op with what it sent.
--
-- never     a newer batch of this lane has run: this one surely never will
-- replayed  this very batch has run: the id of its entry and the entry, '-' and false if it granted nothing, or if it was settled
--           (settle.lua) before it got here and may not run any more
-- nometa epoch run state behind   not under this epoch, not on this Redis process, not open, or older than what was seen
-- late      its deadline has passed by this clock
-- clock     the sidecar's idea of this clock is off by more than one generation of request ids
local function enter(meta, outbox, epoch, run, seen, deadline, lane, counter, resend)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local op = lane .. ':' .. counter
  local m = redis.call('HMGET', meta, 'epoch', 'run', 'state', 'n', 'last', lane)
  if m[6] then
    local recorded, id, settled = string.match(m[6], '^(%d+):(%S+)(.*)$')
    recorded = tonumber(recorded)
    if settled ~= '' and string.find(settled .. ' ', ' ' .. counter .. ' ', 1, true) then return nil, {'replayed', op, now, '-', false} end
    if tonumber(counter) < recorded then return nil, {'never', op, now} end
    if tonumber(counter) == recorded then
      local entry = id ~= '-' and redis.call('XRANGE', outbox, id, id)[1]
      return nil, {'replayed', op, now, id, entry or false}
    end
  end
  if not m[1] then return nil, {'nometa', op, now} end
  if m[1] ~= epoch then return nil, {'epoch', op, now} end
  if m[2] ~= run then return nil, {'run', op, now} end
  if m[3] ~= 'live' then return nil, {'state', op, now} end
  local n = tonumber(m[4])
  if n < tonumber(seen) then return nil, {'behind', op, now} end
  if now > tonumber(deadline) then return nil, {'late', op, now} end
  return {
    meta = meta, outbox = outbox, epoch = epoch, now = now, op = op, first = n, n = n, last = m[5],
    lane = lane, counter = counter, resend = resend == '1',
  }
end
