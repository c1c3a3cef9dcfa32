// Unwraps an ExportedDataKey with node alone:
//
//     node unwrap.mjs KEY.der RSAES_OAEP_SHA_256|RSAES_OAEP_SHA_1 < ExportedDataKey
//
// KEY.der is the private key as PKCS#8; the output is the data key in Base64.

import { readFileSync } from "node:fs";
// [shown in PROTOCOL.md]
import { constants, createPrivateKey, privateDecrypt } from "node:crypto";

const OAEP_HASHES = { RSAES_OAEP_SHA_256: "sha256", RSAES_OAEP_SHA_1: "sha1" };

function unwrap(key, algorithm, exportedDataKey) {
  const options = { key, padding: constants.RSA_PKCS1_OAEP_PADDING, oaepHash: OAEP_HASHES[algorithm] };
  return privateDecrypt(options, Buffer.from(exportedDataKey, "base64"));
}
// [end]

const [path, algorithm] = process.argv.slice(2);
const key = createPrivateKey({ key: readFileSync(path), format: "der", type: "pkcs8" });
console.log(unwrap(key, algorithm, readFileSync(0, "utf8")).toString("base64"));
