-- Makes sure that a batch whose answer got lost either has run or never will, and looks its REQUEST up.
-- keys: meta, requests...
-- args: epoch, run, seen, lane, counter, request
-- returns: {'known', n, text} where the REQUEST is remembered, its change among the first n; else {'settled', n}: if the batch has run, its
-- changes are among the first n, and else it never will; {'no'} where that cannot be said
--
-- A batch that is newer than the last one recorded may still be on its way. It is marked behind that one, in the lane's field:
-- '<counter>:<id> <settled> <settled>', and the guard refuses it. The marks go when the lane next writes. Lanes whose batches granted
-- nothing, such as reads, are not recorded, so the number may be far ahead of the recorded one. What a client can add here is bounded: marks
-- a lane, and fields in meta, since anybody can make up an instance.
local MARKS_MAX, FIELDS_MAX = 64, 1000

local m = redis.call('HMGET', meta, 'epoch', 'run', 'state', 'n', lane)
if m[1] ~= epoch or m[2] ~= run or m[3] ~= 'live' or tonumber(m[4]) < tonumber(seen) then return {'no'} end
for i = 2, #KEYS do
  local text = redis.call('HGET', KEYS[i], request)
  if text then return {'known', m[4], text} end
end
local recorded, marks = string.match(m[5] or '0:-', '^(%d+):%S+(.*)$')
if tonumber(counter) <= tonumber(recorded) or string.find(marks .. ' ', ' ' .. counter .. ' ', 1, true) then return {'settled', m[4]} end
local full = select(2, string.gsub(marks, ' ', '')) >= MARKS_MAX or (not m[5] and redis.call('HLEN', meta) >= FIELDS_MAX)
if full then return {'no'} end
redis.call('HSET', meta, lane, (m[5] or '0:-') .. ' ' .. counter)
return {'settled', m[4]}
