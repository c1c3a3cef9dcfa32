// A client with node's net socket and npm's @msgpack/msgpack, written from PROTOCOL.md.
//
//     NODE_PATH=.../node_modules node client.mjs SOCKET < messages.json
//
// The input is a JSON list of messages, as PROTOCOL.md draws them: [0, msgid, method, [params]] or [2, method, params], and at
// least one is a request. {"$hex": "…"} stands for binary. All are sent at once. The output is a JSON list of all that the agent
// sent until the connection was closed.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import net from "node:net";

// An import statement does not look into NODE_PATH; require does.
const { decodeMultiStream, encode } = createRequire(import.meta.url)("@msgpack/msgpack");

function withBinary(_key, value) {
  return typeof value?.$hex === "string" ? new Uint8Array(Buffer.from(value.$hex, "hex")) : value;
}

const messages = JSON.parse(readFileSync(0, "utf8"), withBinary);
const requests = messages.filter((message) => message[0] === 0).length;

// Once all requests are answered, close one's own side; what comes after that is taken too. An agent that closes first may not
// have read everything: the end is then an error of the socket.
const connection = net.connect({ path: process.argv[2], allowHalfOpen: true });
connection.write(Buffer.concat(messages.map((message) => encode(message))));
const answers = [];
try {
  for await (const answer of decodeMultiStream(connection)) {
    answers.push(answer);
    if (answers.length === requests) connection.end();
  }
} catch (error) {
  if (!["ECONNRESET", "EPIPE"].includes(error.code)) throw error;
}
connection.destroy();
process.stdout.write(JSON.stringify(answers));
