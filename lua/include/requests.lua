-- The memory of REQUEST ids: one hash a stretch of time, id -> '<digest> <reply>', removed whole when its time is over.
-- include: whole
--
-- A request is {id, digest, stamp, key}. stamp is the ms inside a UUIDv7, else 0. key is the place in KEYS of the id's
-- bucket; without a stamp that of generation g-1, with those of g and g+1 behind it (a generation is one window long, g is
-- the sidecar's guess, the script goes by its own clock and looks in the current one and the one before).
--
-- recall returns nil for an id to be decided, or a word and what it needs: known <text>, stale, ahead, full. are_new says of many at once
-- whether all are to be decided: asked is {{key, least and greatest stamp, {id, digest, ...}}, ...}, with 5 values an id. Its buckets get the place
-- in KEYS where their ids are to be remembered as a fifth value.
local remembered, fresh = {}, {}

local function bucket_of(head, stamp, key, window, generation)
  if stamp > 0 then return key, nil end
  local current = key + 1 + math.floor(head.now / window) - generation
  return current, current - 1
end

local function is_out_of_time(head, least, most, window)
  if least > 0 then
    if head.now - least > window then return 'stale' end
    if most - head.now > 60000 then return 'ahead' end
  end
end

-- What is to be remembered in a bucket, and how much it had before.
local function fresh_in(current)
  local bucket = fresh[current]
  if not bucket then
    bucket = {size = redis.call('HLEN', KEYS[current])}
    fresh[current] = bucket
  end
  return bucket
end

local function has_room(bucket, count)
  return bucket.size + #bucket / 2 + count <= 50000
end

local function generation_fits(head, window, generation)
  local ahead = math.floor(head.now / window) - generation
  return ahead == 0 or ahead == 1
end

local function recall(head, request, window, generation)
  local late = is_out_of_time(head, request[3], request[3], window)
  if late then return late end
  if remembered[request[1]] then return 'known', remembered[request[1]] end
  local current, before = bucket_of(head, request[3], request[4], window, generation)
  local text = redis.call('HGET', KEYS[current], request[1])
  if not text and before then text = redis.call('HGET', KEYS[before], request[1]) end
  if text then return 'known', text end
  if not has_room(fresh_in(current), 1) then return 'full' end
  return nil
end

local function has_any(key, ids)
  local found = redis.call('HMGET', key, unpack(ids))
  for i = 1, #ids do
    if found[i] then return true end
  end
  return false
end

local function are_new(head, asked, window, generation)
  for _, bucket in ipairs(asked) do
    local key, least, most, each = unpack(bucket)
    if is_out_of_time(head, least, most, window) then return false end
    local ids = {}
    for at = 1, #each, 5 do ids[#ids + 1] = each[at] end
    local current, before = bucket_of(head, least, key, window, generation)
    if not has_room(fresh_in(current), #ids) or has_any(KEYS[current], ids) or (before and has_any(KEYS[before], ids)) then return false end
    bucket[5] = current
  end
  return true
end

-- text is '<digest> <reply>'.
local function remember_in(current, id, text)
  local bucket = fresh[current]
  local size = #bucket
  bucket[size + 1], bucket[size + 2] = id, text
  remembered[id] = text
end

local function remember(head, request, window, generation, reply)
  local current = bucket_of(head, request[3], request[4], window, generation)
  remember_in(current, request[1], request[2] .. ' ' .. reply)
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
