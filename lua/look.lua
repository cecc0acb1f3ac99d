-- Reads what the verifier compares with Postgres, all at one moment.
-- keys: meta, outbox
-- args: applied
-- flags: readonly
-- returns: {epoch, run, state, n, last, newest entry, entry at the applied position, oldest entry}, nil for what is not there
local m = redis.call('HMGET', meta, 'epoch', 'run', 'state', 'n', 'last')
return {
  m[1], m[2], m[3], m[4], m[5],
  redis.call('XREVRANGE', outbox, '+', '-', 'COUNT', 1)[1] or false,
  redis.call('XRANGE', outbox, applied, applied)[1] or false,
  redis.call('XRANGE', outbox, '-', '+', 'COUNT', 1)[1] or false,
}
