-- Whole numbers as decimals: Lua's own tostring writes 1e+15, and %.0f takes C four times as long. A double is exact up to 2^53, %d up to 2^63.
local function whole(number)
  return string.format('%d', number)
end
