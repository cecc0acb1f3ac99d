-- Lua unpacks at most 7,999 values: a list that may be longer goes in pieces of an even length.
local function in_chunks(list, run)
  for from = 1, #list, 4000 do run(unpack(list, from, math.min(from + 3999, #list))) end
end
