"""Clients that share no line with this project's own. They were written from PROTOCOL.md, which has to be enough for that."""

import base64
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from foreign import plain_client
from support.agent import PATIENCE, RunningAgent, dev_agent
from support.skip_unless import NODE_MODULES, ROOT, node_module, openssl_sm2, program

HERE = Path(__file__).parent / "foreign"
CONTEXT = {"tenant": "7", "purpose": "磁盘", "quote": '"\\/'}

Message = list[Any]
Send = Callable[[Path, Path, list[Message]], list[Message]]
Ask = Callable[[list[Message]], list[Message]]


def _run(*arguments: str, data: bytes = b"", folder: Path | None = None, **environment: object) -> tuple[bytes, str]:
    """Return the output of a program that succeeds, and its messages."""
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(
        arguments, input=data, capture_output=True, timeout=PATIENCE, cwd=folder, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout, done.stderr.decode()


def send_plain(socket: Path, folder: Path, messages: list[Message]) -> list[Message]:
    """Exchange bytes with the agent in Python without any packages (-I and -S)."""
    arguments = [sys.executable, "-I", "-S", str(HERE / "plain_client.py"), str(socket)]
    printed, _ = _run(*arguments, data=json.dumps(messages).encode())
    return list(json.loads(printed))


def send_node(socket: Path, folder: Path, messages: list[Message]) -> list[Message]:
    """Exchange bytes with the agent in JavaScript with npm's @msgpack/msgpack."""
    arguments = ["node", str(HERE / "client.mjs"), str(socket)]
    printed, _ = _run(*arguments, data=json.dumps(messages).encode(), NODE_PATH=NODE_MODULES)
    return list(json.loads(printed))


def send_neovim(script: str, socket: Path, folder: Path, messages: list[Message]) -> list[Message]:
    """Neovim without any configuration, by vim.rpcrequest of its Lua or rpcrequest of Vimscript: one after the other."""
    (folder / "messages.json").write_text(json.dumps(messages))
    (folder / "answers.json").unlink(missing_ok=True)
    options = ["--headless", "-u", "NONE", "-i", "NONE", "-n"]
    commands = ["-c", "execute 'source' fnameescape($CLIENT)", "-c", "qall!"]
    log = folder / "nvim.log"
    _, complaints = _run(
        "nvim", *options, *commands, folder=folder, CLIENT=HERE / script, AGENT=socket, NVIM_LOG_FILE=log
    )
    assert (folder / "answers.json").exists(), complaints
    return list(json.loads((folder / "answers.json").read_bytes()))


PLAIN = pytest.param(send_plain, id="plain")
NODE = pytest.param(send_node, id="node", marks=node_module("@msgpack/msgpack"))
WHOLE_MESSAGES = [PLAIN, NODE]
NEOVIM = [
    pytest.param(functools.partial(send_neovim, "client.lua"), id="nvim-lua", marks=program("nvim", "neovim")),
    pytest.param(functools.partial(send_neovim, "client.vim"), id="nvim-vimscript", marks=program("nvim", "neovim")),
]


@pytest.fixture(params=[*WHOLE_MESSAGES, *NEOVIM])
def ask(request: pytest.FixtureRequest, agent: RunningAgent, tmp_path: Path) -> Ask:
    """Each client, talking to the agent; a test that is not for all of them names those it is for."""
    return functools.partial(request.param, agent.socket, tmp_path)


def call(ask: Ask, method: str, **params: Any) -> dict[str, Any]:
    """The result of one request."""
    [[kind, msgid, error, result]] = ask([[0, 7, method, [params]]])
    assert (kind, msgid, error) == (1, 7, None)
    assert result["RequestId"]
    return dict(result)


def sorted_by_msgid(answers: list[Message]) -> list[Message]:
    """The answers in the order of their msgids: they may come in any."""
    return sorted(answers, key=lambda answer: int(answer[1]))


# Modules, whose private keys only the openssl program touches.


@dataclass(frozen=True)
class Module:
    """A key pair, how a data key is to be wrapped for it, and the master key to try it with."""

    key: Path
    public_key: bytes
    wrapping: dict[str, str]
    master_key: str
    options: tuple[str, ...]

    def request(self, *, binary: bool = False) -> dict[str, Any]:
        """The parameters that say how the data key leaves."""
        public_key = _hex(self.public_key) if binary else base64.b64encode(self.public_key).decode()
        return {"PublicKeyBlob": public_key, **self.wrapping}

    def unwrap(self, exported: str) -> bytes:
        """Return the data key of an ExportedDataKey."""
        wrapped = base64.b64decode(exported, validate=True)
        if self.wrapping["WrappingAlgorithm"] == "SM2PKE":
            wrapped = der_of_sm2(wrapped)
        opened, _ = _run("openssl", "pkeyutl", "-decrypt", "-inkey", str(self.key), *self.options, data=wrapped)
        return opened


def _hex(data: bytes) -> dict[str, str]:
    return {"$hex": data.hex()}


def der_of_sm2(ciphertext: bytes) -> bytes:
    """GM/T 0009's SEQUENCE { INTEGER x, INTEGER y, OCTET STRING C3, OCTET STRING C2 } of `04 ‖ x ‖ y ‖ C3 ‖ C2`."""

    def element(tag: int, content: bytes) -> bytes:
        length = len(content).to_bytes((len(content).bit_length() + 7) // 8)
        return bytes([tag]) + (length if len(content) < 128 else bytes([0x80 | len(length)]) + length) + content

    def integer(data: bytes) -> bytes:
        number = int.from_bytes(data)
        return element(0x02, number.to_bytes(number.bit_length() // 8 + 1))

    assert ciphertext[0] == 4
    x, y, c3, c2 = ciphertext[1:33], ciphertext[33:65], ciphertext[65:97], ciphertext[97:]
    return element(0x30, integer(x) + integer(y) + element(0x04, c3) + element(0x04, c2))


def _oaep(digest: str) -> tuple[str, ...]:
    options = ("rsa_padding_mode:oaep", f"rsa_oaep_md:{digest}", f"rsa_mgf1_md:{digest}")
    return tuple(part for option in options for part in ("-pkeyopt", option))


RSA = ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
SHA_256 = (RSA, "RSA_2048", "RSAES_OAEP_SHA_256", "alias/dev", _oaep("sha256"))
SHA_1 = (RSA, "RSA_2048", "RSAES_OAEP_SHA_1", "alias/dev", _oaep("sha1"))
OAEP_SHA_256 = pytest.param(SHA_256, id="oaep-sha256", marks=program("openssl", "openssl"))
OAEP_SHA_1 = pytest.param(SHA_1, id="oaep-sha1", marks=program("openssl", "openssl"))
SM2 = pytest.param((("-algorithm", "SM2"), "EC_SM2", "SM2PKE", "alias/dev-sm4", ()), id="sm2", marks=openssl_sm2())


@pytest.fixture(scope="module", params=[OAEP_SHA_256, OAEP_SHA_1, SM2])
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """A module's key pair, made by openssl."""
    generate, spec, algorithm, master_key, options = request.param
    key = tmp_path_factory.mktemp("module") / "private.pem"
    _run("openssl", "genpkey", *generate, "-out", str(key))
    public_key, _ = _run("openssl", "pkey", "-in", str(key), "-pubout", "-outform", "DER")
    return Module(key, public_key, {"WrappingKeySpec": spec, "WrappingAlgorithm": algorithm}, master_key, options)


def test_status_is_the_same_for_every_client(ask: Ask) -> None:
    status = call(ask, "GetAgentStatus")
    assert (status["ProtocolVersion"], status["State"]) == (1, "Serving")
    assert status["Keys"] >= 2
    assert {"Connections", "ConnectionsTotal", "RequestsTotal", "RequestsRefused"} <= status["Counters"].keys()


@pytest.mark.parametrize(("alias", "spec"), [("alias/dev", "Aliyun_AES_256"), ("alias/dev-sm4", "Aliyun_SM4")])
def test_a_key_is_found_by_its_alias_its_id_and_its_arn(ask: Ask, alias: str, spec: str) -> None:
    """All three names of a key lead to the same metadata."""
    metadata = call(ask, "DescribeKey", KeyId=alias)["KeyMetadata"]
    assert (metadata["KeySpec"], metadata["KeyState"]) == (spec, "Enabled")
    assert metadata["Arn"] == f"acs:kms:local:0:key/{metadata['KeyId']}"
    for name in (metadata["KeyId"], metadata["Arn"], f"acs:kms:local:0:{alias}"):
        assert call(ask, "DescribeKey", KeyId=name)["KeyMetadata"] == metadata


def test_foreign_client_does_the_main_job(ask: Ask, module: Module) -> None:
    """A data key is wrapped for the module's public key, twice, and equals the content of the CiphertextBlob."""
    made = call(ask, "GenerateAndExportDataKey", KeyId=module.master_key, **module.request())
    data_key = module.unwrap(made["ExportedDataKey"])
    assert len(data_key) == 32
    opened = call(ask, "Decrypt", CiphertextBlob=made["CiphertextBlob"])
    assert base64.b64decode(opened["Plaintext"], validate=True) == data_key
    again = call(ask, "ExportDataKey", CiphertextBlob=made["CiphertextBlob"], **module.request())
    assert module.unwrap(again["ExportedDataKey"]) == data_key
    assert again["ExportedDataKey"] != made["ExportedDataKey"]
    for answer in (opened, again):
        assert (answer["KeyId"], answer["KeyVersionId"]) == (made["KeyId"], made["KeyVersionId"])


@pytest.mark.parametrize("ask", WHOLE_MESSAGES, indirect=True)
def test_keys_and_ciphertexts_may_be_sent_as_bin(ask: Ask, module: Module) -> None:
    """MessagePack's bin stands for the same bytes as their Base64; answers always hold Base64."""
    asked = {"KeyId": module.master_key, "NumberOfBytes": 190}
    made = call(ask, "GenerateAndExportDataKey", **asked, **module.request(binary=True))
    blob = _hex(base64.b64decode(made["CiphertextBlob"], validate=True))
    again = call(ask, "ExportDataKey", CiphertextBlob=blob, **module.request(binary=True))
    data_key = module.unwrap(made["ExportedDataKey"])
    assert len(data_key) == 190
    assert module.unwrap(again["ExportedDataKey"]) == data_key
    assert base64.b64decode(call(ask, "Decrypt", CiphertextBlob=blob)["Plaintext"], validate=True) == data_key


@pytest.mark.parametrize("module", [OAEP_SHA_256], indirect=True)
def test_an_encryption_context_is_a_map_or_its_json(ask: Ask, module: Module) -> None:
    """Either form, in any order of pairs, opens ciphertexts of the other; a missing context opens none."""
    turned = dict(reversed(CONTEXT.items()))
    forms = [CONTEXT, turned, json.dumps(CONTEXT), json.dumps(turned, ensure_ascii=False, indent=1)]
    for given in (CONTEXT, json.dumps(CONTEXT)):
        asked = {"KeyId": module.master_key, "EncryptionContext": given, **module.request()}
        made = call(ask, "GenerateAndExportDataKey", **asked)
        params = [{"CiphertextBlob": made["CiphertextBlob"], "EncryptionContext": form} for form in forms]
        params.append({"CiphertextBlob": made["CiphertextBlob"]})
        *opened, without = sorted_by_msgid(ask([[0, msgid, "Decrypt", [each]] for msgid, each in enumerate(params)]))
        data_keys = [base64.b64decode(result["Plaintext"], validate=True) for _, _, _, result in opened]
        assert data_keys == [module.unwrap(made["ExportedDataKey"])] * len(forms)
        assert without[2]
        assert without[3] is None


NOT_FOUND = "Specified api is not found, please check your url and method."
NOT_VALID = "The specified parameter is not valid."
REFUSED = [
    ("Shutdown", [{}], "InvalidAction.NotFound", 404, NOT_FOUND),
    ("DescribeKey", [{}], "MissingParameter", 400, 'The parameter "KeyId" is needed but not provided.'),
    ("DescribeKey", [{"KeyId": 7}], "InvalidParameter", 400, NOT_VALID),
    ("DescribeKey", [{"KeyId": "alias/dev", "Colour": "x"}], "InvalidParameter", 400, NOT_VALID),
    ("DescribeKey", [{"KeyId": "alias/none"}], "Forbidden.AliasNotFound", 404, "The specified Alias is not found."),
    ("Decrypt", [{"CiphertextBlob": "AAAA"}], "InvalidParameter", 400, NOT_VALID),
    ("GetAgentStatus", [], "InvalidParameter", 400, NOT_VALID),
]
ASKED: list[Message] = [[0, msgid, method, params] for msgid, (method, params, *_) in enumerate(REFUSED)]
ASKED.append([0, len(REFUSED), "GetAgentStatus", [{}]])


@pytest.mark.parametrize("ask", WHOLE_MESSAGES, indirect=True)
def test_an_error_has_four_fields(ask: Ask) -> None:
    """A refused request, also of an unknown operation, gets an error with its msgid; the connection goes on."""
    *refused, served = sorted_by_msgid(ask(ASKED))
    assert served[3]["State"] == "Serving"
    for (_, _, error, result), (_, _, code, status, beginning) in zip(refused, REFUSED, strict=True):
        assert result is None
        assert error.keys() == {"Code", "Message", "RequestId", "HttpStatus"}
        assert (error["Code"], error["HttpStatus"]) == (code, status)
        assert error["Message"].startswith(beginning)
        assert error["RequestId"]


@pytest.mark.parametrize("ask", NEOVIM, indirect=True)
def test_neovim_shows_that_there_was_an_error(ask: Ask) -> None:
    """Neovim calls every error that is a map unknown; its channel goes on."""
    *refused, served = ask(ASKED)
    assert len(refused) == len(REFUSED)
    assert all("unknown error" in error and result is None for _, _, error, result in refused)
    assert served[3]["State"] == "Serving"


@pytest.mark.parametrize("ask", WHOLE_MESSAGES, indirect=True)
@pytest.mark.parametrize("module", [SM2], indirect=True)
def test_each_of_200_requests_at_once_gets_its_own_answer(ask: Ask, module: Module) -> None:
    """The answer with msgid n has a data key of n bytes, in any order of the answers."""
    asked = {"KeyId": module.master_key, **module.request()}
    numbers = range(1, 201)
    answers = ask([[0, number, "GenerateAndExportDataKey", [{**asked, "NumberOfBytes": number}]] for number in numbers])
    lengths = {msgid: len(base64.b64decode(result["ExportedDataKey"])) for _, msgid, _, result in answers}
    assert len(answers) == len(numbers)
    assert lengths == {number: 97 + number for number in numbers}


@pytest.mark.parametrize("send", NEOVIM)
def test_neovim_sends_bytes_as_str(send: Send, socket_path: Path, tmp_path: Path) -> None:
    """A Blob and a Lua string arrive as MessagePack str with their raw bytes: InvalidParameter, and the channel goes on."""
    raw = _hex(b"\x00\xff\xc3(")
    requests = [
        [0, 1, "DescribeKey", [{"KeyId": raw}]],
        [0, 2, "Decrypt", [{"CiphertextBlob": raw}]],
        [0, 3, "GetAgentStatus", [{}]],
    ]
    with dev_agent(socket_path) as own:
        refused, also_refused, served = send(own.socket, tmp_path, requests)
        outcomes = [own.wait_for("audit", count)["outcome"] for count in (1, 2, 3)]
    assert outcomes == ["InvalidParameter", "InvalidParameter", "OK"]
    assert "unknown error" in refused[2]
    assert "unknown error" in also_refused[2]
    assert served[3]["State"] == "Serving"


def test_a_str_that_is_not_utf_8_is_an_invalid_parameter(agent: RunningAgent) -> None:
    """A plain client sends the same bytes as neovim and sees the whole answer."""
    asked = b"".join(plain_client.encode([0, msgid, "DescribeKey", [{"KeyId": "????"}]]) for msgid in (1, 2))
    answers = list(plain_client.exchange(str(agent.socket), asked.replace(b"????", b"\x00\xff\xc3("), 2))
    refused = [(msgid, error["Code"]) for _, msgid, error, _ in sorted_by_msgid(answers)]
    assert refused == [(1, "InvalidParameter"), (2, "InvalidParameter")]


def test_a_notification_gets_no_answer(ask: Ask) -> None:
    """A notification has no effect, whether or not it names an operation; requests around it are served."""
    before, after = ([0, msgid, "DescribeKey", [{"KeyId": "alias/dev"}]] for msgid in (7, 8))
    answers = ask([before, [2, "DescribeKey", [{}]], [2, "Shutdown", []], after])
    assert [(msgid, error) for _, msgid, error, _ in sorted_by_msgid(answers)] == [(7, None), (8, None)]


@pytest.mark.parametrize("ask", [NODE], indirect=True)
def test_a_float_ends_the_connection(ask: Ask) -> None:
    """JavaScript sends 16.5 as a float; earlier requests are answered, and the last answer has no msgid."""
    asked = [[0, 1, "GetAgentStatus", [{}]], [0, 2, "GenerateAndExportDataKey", [{"NumberOfBytes": 16.5}]]]
    served, last = ask(asked)
    assert (served[1], served[2]) == (1, None)
    assert (last[1], last[2]["Code"], last[2]["HttpStatus"], last[3]) == (None, "ProtocolError", 400, None)


def test_example_of_the_protocol_page_is_exact(agent: RunningAgent) -> None:
    """An encoder makes the bytes that PROTOCOL.md prints from the request, and the agent serves them."""
    page = (ROOT / "PROTOCOL.md").read_text("utf-8")
    [example] = re.findall(r"^For example, `DescribeKey` with msgid 7:\n\n((?: {4}.*\n)+)", page, re.MULTILINE)
    printed = bytes.fromhex("".join(re.findall(r"^ {4}((?:[0-9a-f]{2} )+)", example, re.MULTILINE)))
    assert printed == plain_client.encode([0, 7, "DescribeKey", [{"KeyId": "alias/dev"}]])
    [[kind, msgid, error, result]] = plain_client.exchange(str(agent.socket), printed, 1)
    assert (kind, msgid, error) == (1, 7, None)
    assert result["KeyMetadata"]["KeySpec"] == "Aliyun_AES_256"


@program("go", "golang-go")
def test_a_client_in_go_makes_a_data_key_and_unwraps_it(agent: RunningAgent, tmp_path: Path) -> None:
    """The Go client needs only the standard library and its own small part of MessagePack."""
    environment = {"GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": "-buildvcs=false", "CGO_ENABLED": "0"}
    build = ["go", "build", "-o", str(tmp_path / "client"), str(HERE / "client.go")]
    subprocess.run(build, env={**os.environ, **environment}, check=True)  # may compile Go's library first
    printed, _ = _run(str(tmp_path / "client"), str(agent.socket), "alias/dev")
    made = json.loads(printed)
    with agent.client() as kms:
        assert kms.decrypt(ciphertext_blob=made["CiphertextBlob"]).plaintext == made["DataKey"]
    refused = [str(tmp_path / "client"), str(agent.socket), "alias/none"]
    done = subprocess.run(refused, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert "Forbidden.AliasNotFound: The specified Alias is not found." in done.stderr
