-- The memory of REQUEST ids: one hash a stretch of time, id -> '<digest> <reply>', removed whole when its time is over.
-- include: whole
--
-- A request is {id, digest, stamp, key}. stamp is the ms inside a UUIDv7, else 0. key is the place in KEYS of the id's
-- bucket; without a stamp that of generation g-1, with those of g and g+1 behind it (a generation is one window long, g is
-- the sidecar's guess, the script goes by its own clock and looks in the current one and the one before).
--
-- recall returns nil for an id to be decided, or a word and what it needs: known <text>, stale, ahead, full.
local remembered, fresh = {}, {}

local function bucket_of(head, request, window, generation)
  if request[3] > 0 then return request[4], nil end
  local current = request[4] + 1 + math.floor(head.now / window) - generation
  return current, current - 1
end

local function generation_fits(head, window, generation)
  local ahead = math.floor(head.now / window) - generation
  return ahead == 0 or ahead == 1
end

local function recall(head, request, window, generation)
  local stamp = request[3]
  if stamp > 0 then
    if head.now - stamp > window then return 'stale' end
    if stamp - head.now > 60000 then return 'ahead' end
  end
  if remembered[request[1]] then return 'known', remembered[request[1]] end
  local current, before = bucket_of(head, request, window, generation)
  local text = redis.call('HGET', KEYS[current], request[1])
  if not text and before then text = redis.call('HGET', KEYS[before], request[1]) end
  if text then return 'known', text end
  local bucket = fresh[current]
  if not bucket then
    bucket = {size = redis.call('HLEN', KEYS[current])}
    fresh[current] = bucket
  end
  if bucket.size + #bucket / 2 >= 50000 then return 'full' end
  return nil
end

local function remember(head, request, window, generation, reply)
  local current = bucket_of(head, request, window, generation)
  local bucket, text = fresh[current], request[2] .. ' ' .. reply
  bucket[#bucket + 1] = request[1]
  bucket[#bucket + 1] = text
  remembered[request[1]] = text
end

-- EXPIRE is a far backstop only: the sweeper removes a bucket when nothing can ask for it any more.
local function keep_requests(window)
  for key, bucket in pairs(fresh) do
    if #bucket > 0 then
      redis.call('HSET', KEYS[key], unpack(bucket))
      if bucket.size == 0 then redis.call('PEXPIRE', KEYS[key], whole(window * 4 + 3600000)) end
    end
  end
end
