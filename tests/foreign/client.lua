-- A client in the Lua of neovim, with vim.rpcrequest, written from PROTOCOL.md.
--
-- It takes messages.json in the working folder, in the form that client.mjs describes, and the agent's socket in the environment
-- as AGENT; it writes answers.json. Neovim numbers its requests itself, has one under way at a time, and gives a script a result
-- or an exception; here they are written in the form of answers: [1, msgid, text of the exception, result].

local function bytes(value)
  if type(value) ~= 'table' or not value['$hex'] then return value end
  return (value['$hex']:gsub('..', function(pair) return string.char(tonumber(pair, 16)) end))
end

local answers = {}
local channel = vim.fn.sockconnect('pipe', vim.env.AGENT, {rpc = true})
for _, message in ipairs(vim.json.decode(table.concat(vim.fn.readfile('messages.json')))) do
  if message[1] == 2 then
    vim.rpcnotify(channel, message[2], unpack(message[3]))
  else
    for _, map in ipairs(message[4]) do
      for name, value in pairs(map) do map[name] = bytes(value) end
    end
    local served, answer = pcall(vim.rpcrequest, channel, message[3], unpack(message[4]))
    table.insert(answers, {1, message[2], served and vim.NIL or answer, served and answer or vim.NIL})
  end
end
vim.fn.writefile({vim.json.encode(answers)}, 'answers.json')
