-- Numbers as whole decimals: Lua's own tostring writes 1e+15.
local function whole(number)
  return string.format('%.0f', number)
end
