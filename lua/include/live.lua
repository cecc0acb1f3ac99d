-- Whether a script that only reads may trust this Redis: nil, or what does not fit, 'nometa', 'epoch', 'run' or 'state'.
local function unfit(meta, epoch, run)
  local m = redis.call('HMGET', meta, 'epoch', 'run', 'state')
  if not m[1] then return 'nometa' end
  if m[1] ~= epoch then return 'epoch' end
  if m[2] ~= run then return 'run' end
  if m[3] ~= 'live' then return 'state' end
  return nil
end
