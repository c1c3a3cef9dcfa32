" A client in Vimscript, with neovim's rpcrequest, written from PROTOCOL.md.
"
" It takes messages.json in the working folder, in the form that client.mjs describes, and the agent's socket in the environment
" as AGENT; it writes answers.json. Neovim numbers its requests itself, has one under way at a time, and gives a script a result
" or an exception; here they are written in the form of answers: [1, msgid, text of the exception, result].

function Bytes(name, value)
  return type(a:value) == v:t_dict && has_key(a:value, '$hex') ? eval('0z' .. a:value['$hex']) : a:value
endfunction

let answers = []
let channel = sockconnect('pipe', $AGENT, {'rpc': v:true})
for message in json_decode(readfile('messages.json'))
  if message[0] == 2
    call call('rpcnotify', [channel, message[1]] + message[2])
    continue
  endif
  call map(message[3], {_, given -> map(given, function('Bytes'))})
  try
    call add(answers, [1, message[1], v:null, call('rpcrequest', [channel, message[2]] + message[3])])
  catch
    call add(answers, [1, message[1], v:exception, v:null])
  endtry
endfor
call writefile([json_encode(answers)], 'answers.json')
