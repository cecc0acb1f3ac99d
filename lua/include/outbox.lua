-- The one way into the outbox.
-- include: whole
--
-- append writes the accepted lines as one entry and advances meta. It is the first write of every script, since Redis
-- does not roll a script back: XADD is the only command that can still fail, and nothing has been changed then.
-- A batch that was sent before leaves its counter even if it granted nothing, so that the first sending cannot run later.
local function append(head, lines)
  if #lines == 0 then
    if head.resend then redis.call('HSET', head.meta, head.lane, head.counter .. ':-') end
    return
  end
  local id = head.epoch .. '-' .. whole(head.n + #lines)
  redis.call('XADD', head.outbox, id, 'first', whole(head.n + 1), 'prev', head.last, 'op', head.op,
    'at', whole(head.now), 'changes', table.concat(lines, '\n'))
  redis.call('HSET', head.meta, 'n', whole(head.n + #lines), 'id', id, 'last', head.op, head.lane, head.counter .. ':' .. id)
end
