-- The one way into the outbox.
-- include: whole
--
-- append writes the accepted lines as one entry and advances meta. It is the first write of every script, since Redis
-- does not roll a script back: XADD is the only command that can still fail, and nothing has been changed then.
-- A batch that was sent before leaves its counter even if it granted nothing, so that the first sending cannot run later.
-- summed, if there is one, is {count, text, before} of lines that stand in front, see sums.lua; head.n counts them already.
local function append(head, lines, summed)
  local last = head.n + #lines
  if last == head.first then
    if head.resend then redis.call('HSET', head.meta, head.lane, head.counter .. ':-') end
    return
  end
  local id = head.epoch .. '-' .. whole(last)
  local text = table.concat(lines, '\n')
  if summed and summed.count > 0 then
    if #lines > 0 then text = summed.text .. '\n' .. text else text = summed.text end
    redis.call('XADD', head.outbox, id, 'first', whole(head.first + 1), 'prev', head.last, 'op', head.op,
      'at', whole(head.now), 'before', summed.before, 'changes', text)
  else
    redis.call('XADD', head.outbox, id, 'first', whole(head.first + 1), 'prev', head.last, 'op', head.op,
      'at', whole(head.now), 'changes', text)
  end
  redis.call('HSET', head.meta, 'n', whole(last), 'id', id, 'last', head.op, head.lane, head.counter .. ':' .. id)
end
