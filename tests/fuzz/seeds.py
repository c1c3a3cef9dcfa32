"""The seeds of each target: a few valid inputs, from which the fuzzer starts.

PYTHONPATH=tests python -m fuzz.seeds       writes them into the corpora
"""

import base64
import json
from typing import Any
from urllib.parse import urlencode

import msgpack
import pyrage
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from reference import blob_decoder, file_decoder
from support.gateway import Credentials, acs3_headers, v1_parameters
from support.keys import ALGORITHMS, recipient, spki

from keyferry import age_passphrase
from keyferry.parameters import encode_base64
from keyferry.protocol import wire
from keyferry.sm2_ciphertext import raw_to_der, raw_to_sdf
from keyferry_agent.chained_log import chain
from keyferry_agent.crypto import selftest
from keyferry_agent.keyring.document import Document

from .corpus import CORPUS
from .targets import ciphertexts, files, keyrings, operators, requests
from .targets.answers import CALLS

_TENANT = {"tenant": "acme"}


def _codec() -> list[bytes]:
    found = [
        wire.encode_request(
            7, "DescribeKey", {"KeyId": "alias/a-0", "n": -5, "blob": b"\0\xff", "no": None, "yes": True}
        ),
        wire.encode_response(7, None, {"Keys": {"Key": [{"KeyId": str(n)} for n in range(70)]}, "TotalCount": 2**40}),
        wire.encode_response(None, {"Code": "ProtocolError", "Message": "x" * 300}, None),
        wire.encode_notification("x", {}),
        msgpack.packb([0, 1, 2, [{}]]),
        msgpack.packb([0, 1, "x", [{"float": 1.5}]]),
        b"\x94\0\xce\0\0\0\1\xd9\1x\xdc\0\1\xde\0\2\xa1a\xc4\1b\xda\0\1b\xdf\0\0\0\0",
        b"\x91" * 9,
        b"\xdd\xff\xff\xff\xff",
        b"\x94\0\x01\xa1x\x91\x82\xa1k\x01\xa1k\x02",
    ]
    return [b"\1\2" + data for data in [*found, b"".join(found[:4])]]


def _agent() -> list[bytes]:
    found: list[tuple[str, dict[str, Any]]] = [
        ("Encrypt", {"KeyId": "alias/a-0", "Plaintext": "AAECAw==", "EncryptionContext": _TENANT}),
        ("Encrypt", {"KeyId": "acs:kms:local:0:alias/b-1", "Plaintext": "AAECAw==", "DryRun": "true"}),
        ("Decrypt", {"CiphertextBlob": requests.blob(0, _TENANT, b"data"), "EncryptionContext": '{"tenant": "acme"}'}),
        ("Decrypt", {"CiphertextBlob": encode_base64(requests.blob(1, {}, b"data"))}),
        ("Decrypt", {"CiphertextBlob": requests.blob(2, {}, b"data")}),
        (
            "ReEncrypt",
            {
                "CiphertextBlob": requests.blob(0, _TENANT, b"data"),
                "SourceEncryptionContext": _TENANT,
                "DestinationKeyId": "alias/b-0",
                "DestinationEncryptionContext": _TENANT,
            },
        ),
        ("GenerateDataKey", {"KeyId": "alias/a-1", "KeySpec": "AES_128", "NumberOfBytes": 40}),
        ("GenerateDataKeyWithoutPlaintext", {"KeyId": requests.KEYS[0], "EncryptionContext": {"密" * 40: "größe"}}),
        ("DescribeKey", {"KeyId": "alias/d-0"}),
        ("ListKeys", {"PageNumber": 1, "PageSize": 100}),
        ("ListKeyVersions", {"KeyId": "alias/a-0"}),
        ("ListAliases", {}),
        ("GetAgentStatus", {}),
        ("Nothing", {}),
    ]
    for algorithm in ALGORITHMS:
        to = recipient(algorithm)
        found.append(("GenerateAndExportDataKey", {"KeyId": "alias/a-0", "NumberOfBytes": 32, **to.params}))
        found.append(("ExportDataKey", {"CiphertextBlob": requests.blob(0, {}, b"k" * 32), **to.params}))
    return [wire.encode_request(number, *each) for number, each in enumerate(found)]


def _answers() -> list[bytes]:
    msgids = {call.name: msgid for msgid, call in enumerate(CALLS, 1)}
    found = [wire.encode_response(None, {"Code": "ProtocolError", "Message": "x"}, None)]
    for packed in _agent():
        decoder = wire.Decoder()
        decoder.feed(packed)
        (request,) = decoder.messages()
        assert isinstance(request, wire.Request)
        msgid = msgids.get(request.method, 1)
        result = requests.answered(request)
        if isinstance(result, dict):
            found.append(wire.encode_response(msgid, None, result))
        else:
            code, message = result
            found.append(wire.encode_response(msgid, {"Code": code, "Message": message, "HttpStatus": 400}, None))
    return found


def _ciphertext() -> list[bytes]:
    made = [b"\1" + bytes(32) + b"plaintext", b"\3" + bytes(32) + b"plaintext", b"\7" + bytes(33)]
    for number, spec in enumerate(ciphertexts.SPECS):
        for place, context in enumerate(ciphertexts.CONTEXTS):
            key_id, version = ciphertexts.KEY_ID, ciphertexts.VERSION_ID
            sealed = blob_decoder.seal_blob(spec, ciphertexts.cmk(spec), version, key_id, context, b"data", bytes(32))
            made.append(bytes([place * 4 + number * 2]) + sealed)
    return [*made, b"\0QUJDRA=="]


def _context() -> list[bytes]:
    texts = [
        '{"tenant":"acme"}',
        "{}",
        '{"größe":"密","":""}',
        r'{"a":"\ud800"}',
        r'{"a":"\u0000\"\\"}',
        '{"a":1}',
        '{"a":"","a":""}',
    ]
    return [text.encode() for text in texts]


def _sm2() -> list[bytes]:
    raw = bytes.fromhex(selftest._SM2_CIPHERTEXT)
    small = b"\x04" + bytes(31) + b"\x05" + bytes(31) + b"\xff" + bytes(32) + b"x" * 200
    return [form for each in (raw, small) for form in (each, raw_to_der(each), raw_to_sdf(each))]


def _public_key() -> list[bytes]:
    ders = [recipient(algorithm).der for algorithm in ("RSAES_OAEP_SHA_256", "SM2PKE")]
    others = [rsa.generate_private_key(65_537, size) for size in (1_024, 3_072)]
    ders += [
        spki(key) for key in (*others, ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate())
    ]
    armour = [f"-----{word} PUBLIC KEY-----\n".encode() for word in ("BEGIN", "END")]
    return [*ders, armour[0] + encode_base64(ders[1]).encode() + b"\n" + armour[1]]


def _encrypted_file() -> list[bytes]:
    record = {"Name": "r", "KeyId": "k", "KeyVersionId": "v", "CiphertextBlob": "b", "EncryptionContext": _TENANT}
    text = json.dumps(record).encode()
    whole = file_decoder.write(files.DATA_KEY, text, bytes(32), bytes(12), b"plaintext")
    return [whole, whole[: len(text) + 100], b"\xff", b"\xff" + bytes(32), b"\xff" + bytes(100)]


def _configuration() -> list[bytes]:
    pages = (operators.__file__.split("tests")[0], ("README.md", "docs/configuration.md"))
    texts = [part.split("```")[0] for page in pages[1] for part in _page(pages[0] + page).split("```toml\n")[1:]]
    return [text.encode() for text in (*texts, _EVERYTHING)]


_EVERYTHING = """
keyring = "/k"
unseal = "credential:name"
region = "r"
account = "a"
memory = "prefer"
memory_backing = "mlock"
sm2_fallback = "gmssl"
keep_keys = true
metrics = { listen = "127.0.0.1:9464" }
limits = { connections = 1, connections_per_user = 1, request_timeout = 1.5, requests_per_second = 1 }
audit = { path = "/a", on_failure = "serve" }
[[listener]]
name = "l"
path = "/l"
mode = "0600"
user = 0
group = "root"
[[grant]]
name = "g"
to = { user = "root", group = "root", uid = 0, gid = 0, listener = "l", unit = "a.service", exe = "/e" }
actions = ["kms:*"]
keys = ["alias/*-a-*", "acs:kms:r:a:key/*"]
encryption_context = { a = "b" }
"""


def _page(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _keyring() -> list[bytes]:
    alone = Document([], keyrings.WHOLE.keys[:1])
    return [each.to_json() for each in (keyrings.WHOLE, Document(["age1"]), alone)] + [b"\xff", b"\xff\5\1"]


def _identity() -> list[bytes]:
    mine = pyrage.x25519.Identity.from_str(keyrings.IDENTITY)
    sealed = bytes(pyrage.encrypt(b"payload", [mine.to_public()]))
    to_passphrase = age_passphrase._seal(b"payload", keyrings.PASSPHRASE, 1)
    lines = list(age_passphrase._wrapped(base64.b64encode(to_passphrase)))
    ssh = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8PBpxRnWYhlZmfTlUNEBwSjU0xkmwMBp5pNBPXvtdY"
    return [
        keyrings.IDENTITY.encode() + b"\n",
        str(mine.to_public()).encode(),
        sealed,
        ssh,
        b"a passphrase\r\n",
        b"-----BEGIN ",
        to_passphrase,
        b"-----BEGIN AGE ENCRYPTED FILE-----\n%b\n-----END AGE ENCRYPTED FILE-----\n" % b"\n".join(lines),
    ]


def _audit() -> list[bytes]:
    lines, previous = [], chain.BEGINNING
    for operation in ("Decrypt", "ExportDataKey", "DescribeKey"):
        record = {
            "time": "2026-01-31T12:00:00.000+00:00",
            "event": "audit",
            "operation": operation,
            "uid": 1000,
            "gids": [1000],
            "key_id": "k",
            "recipient": "",
            "outcome": "OK",
            "previous": previous,
        }
        lines.append(json.dumps(record).encode())
        previous = chain.link(lines[-1])
    whole = b"".join(line + b"\n" for line in lines)
    return [
        whole,
        whole + b'{"event": "startup"}\n',
        whole[:-1],
        b"\xff\0\5\1one\ntwo\nthree",
        b"\xff\1\0\x20one\ntwo\nthree",
    ]


def _http() -> list[bytes]:
    credentials, host = Credentials("LTAIofTheFuzzer", "a secret of the fuzzer"), b"Host: localhost\r\n"
    fixed = {"Timestamp": "2026-01-31T12:00:00Z", "SignatureNonce": "1"}
    query = urlencode(
        v1_parameters(credentials, "Encrypt", {"KeyId": "alias/a", "Plaintext": "+/8="}, **fixed)
    ).encode()
    form = b"Content-Type: application/x-www-form-urlencoded\r\n"
    acs3 = acs3_headers(
        credentials,
        "localhost",
        "ListKeys",
        {"PageSize": "7"},
        x_acs_date=fixed["Timestamp"],
        x_acs_signature_nonce="1",
    )
    lines = b"".join(f"{name}: {value}\r\n".encode() for name, value in acs3.items())
    length = b"Content-Length: %d\r\n\r\n" % len(query)
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    return [
        b"GET /?" + query + b" HTTP/1.1\r\n" + host + b"\r\n",
        b"POST / HTTP/1.1\r\n" + host + form + length + query,
        b"POST / HTTP/1.1\r\n" + host + form + chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(query), query),
        b"POST /?PageSize=7 HTTP/1.1\r\n" + lines + chunked + b"0\r\n\r\n",
        (b"GET /?A=%C3%BC&B HTTP/1.0\r\n" + host + b"\r\n") * 2,
        b"GET /?A=%ff&A=1&%=+ HTTP/1.1\r\nX-Odd:\t\xff \r\n" + host + b"Expect: 100-continue\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: other:80\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"X-Space : 1\r\n\r\n",
    ]


SEEDS = {
    "codec": _codec,
    "agent": _agent,
    "answers": _answers,
    "ciphertext": _ciphertext,
    "context": _context,
    "sm2_ciphertext": _sm2,
    "public_key": _public_key,
    "encrypted_file": _encrypted_file,
    "configuration": _configuration,
    "keyring": _keyring,
    "identity": _identity,
    "audit": _audit,
    "http": _http,
}

if __name__ == "__main__":
    for target, make in SEEDS.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(make()):
            (CORPUS / target / f"seed-{number:02}").write_bytes(seed)
