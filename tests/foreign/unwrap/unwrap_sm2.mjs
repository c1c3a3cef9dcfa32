// Unwraps an ExportedDataKey under SM2PKE with npm's sm-crypto:
//
//     NODE_PATH=.../node_modules node unwrap_sm2.mjs KEY.hex [C1C2C3] < ExportedDataKey
//
// KEY.hex is the private key's number in 64 hexadecimal digits; the output is the data key in Base64. With C1C2C3, the input is in
// that order.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

// An import statement does not look into NODE_PATH; require does.
const { sm2 } = createRequire(import.meta.url)("sm-crypto");

// [shown in PROTOCOL.md]
const C1C3C2 = 1;

function unwrap(privateKeyHex, exportedDataKey, mode = C1C3C2) {
  const wrapped = Buffer.from(exportedDataKey, "base64");
  // Without the 04 at its beginning. doDecrypt returns an empty array instead of an error.
  const dataKey = Buffer.from(sm2.doDecrypt(wrapped.subarray(1).toString("hex"), privateKeyHex, mode, { output: "array" }));
  if (wrapped[0] !== 4 || dataKey.length !== wrapped.length - 97) throw new Error("not exported to this key, or damaged");
  return dataKey;
}
// [end]

const [path, order] = process.argv.slice(2);
const exported = readFileSync(0, "utf8");
console.log(unwrap(readFileSync(path, "utf8"), exported, order === "C1C2C3" ? 0 : C1C3C2).toString("base64"));
