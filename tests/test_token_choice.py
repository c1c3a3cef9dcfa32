"""Which token is meant: by label, serial number, slot or URI, in libraries with several tokens, and with slots without one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import skip_unless, tokens
from support.tokens import RealToken

from keyferry.module import ModuleError, Pkcs11Module
from keyferry.module.token_choice import FoundToken, TokenChoice, choose

LOGIN_REQUIRED, TOKEN_INITIALIZED = 0x4, 0x400
NO_LOGIN = TOKEN_INITIALIZED
SLOTS = [
    f"3|0|{NO_LOGIN}|0001|app",
    "4|224|0||",
    f"9|0|{NO_LOGIN}|0002|app",
    f"10|0|{NO_LOGIN}|  7 8|spaced",
    "11|0|0|blank|",
    "12|48|0||",
    f"13|0|{NO_LOGIN}||no serial",
    f"14|0|{NO_LOGIN}||no serial",
]
"""An empty slot, a token that is not initialised, a reader that is out of order, and tokens of one label."""

gcc = skip_unless.program("gcc", "gcc")
Open = Callable[..., str]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library whose slots are above."""
    return tokens.odd_library(tmp_path_factory.mktemp("odd"))


@pytest.fixture
def refusal(odd: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Why a token does not open: the library has no key pairs, so that a token is found where the key pair is missed."""
    monkeypatch.setenv("ODD_TOKENS", "\n".join(SLOTS))

    def opened(**arguments: Any) -> str:
        with pytest.raises(ModuleError) as caught:
            Pkcs11Module.open(odd, key_label="key", **arguments)
        return str(caught.value)

    return opened


FOUND: dict[str, dict[str, Any]] = {
    "serial": {"token_serial": "0002"},
    "serial with the padding of Cryptoki": {"token_serial": "0002            "},
    "serial with zero bytes": {"token_serial": "0002\0\0"},
    "label and serial": {"token_label": "app", "token_serial": "0002"},
    "label with padding": {"token_label": "spaced   "},
    "serial that begins with spaces": {"token_serial": "  7 8"},
    "serial that begins with spaces, without them": {"token_serial": "7 8"},
    "slot": {"slot": 9},
    "slot of a token without serial": {"token_label": "no serial", "slot": 14},
    "all three": {"token_label": "app", "token_serial": "0001", "slot": 3},
    "URI": {"token_uri": "pkcs11:token=app;serial=0002"},
    "URI with escapes": {
        "token_uri": "PKCS11:model=odd%20model;manufacturer=odd%20maker;serial=%30%30%302;token=a%70p"
    },
    "URI with a slot": {"token_uri": "pkcs11:slot-id=9"},
    "URI beside a label": {"token_uri": "pkcs11:serial=0001", "token_label": "app"},
}


@gcc
@pytest.mark.parametrize("arguments", FOUND.values(), ids=FOUND)
def test_token_matches_all_required_attributes(refusal: Open, arguments: dict[str, Any]) -> None:
    """Every named attribute must match, without its padding."""
    assert "has no RSA key pair 'key'" in refusal(**arguments)


@gcc
def test_tokens_of_one_label_are_listed_with_serial_and_slot(refusal: Open) -> None:
    """The message names an argument that chooses one of them, which is the serial number only if serials differ."""
    message = refusal(token_label="app")
    assert "has 2 tokens 'app': 'app' (slot 3, serial number '0001'); 'app' (slot 9, serial number '0002')." in message
    assert message.endswith("Choose one of them with token_serial or slot")
    assert refusal(token_label="no serial").endswith("Choose one of them with slot")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "slot without a token": ({"slot": 4}, r"no token in slot 4 \(CKR_TOKEN_NOT_PRESENT\): insert one"),
    "reader out of order": ({"slot": 12}, r"no token in slot 12 \(CKR_DEVICE_ERROR\)"),
    "slot that is not there": ({"slot": 5}, r"has no token in slot 5; it has: 'app' \(slot 3, serial number '0001'\)"),
    "not initialised": ({"slot": 11}, r"the token in slot 11 .* is not initialised; initialise it"),
    "unknown serial": ({"token_serial": "0003"}, r"no token with serial number '0003'; it has: .*'0001'.*'0002'"),
    "label and serial of two": ({"token_label": "spaced", "token_serial": "0001"}, "contradict each other"),
    "label and slot of two": ({"token_label": "spaced", "slot": 3}, "contradict each other"),
    "serial and slot of two": ({"token_serial": "0002", "slot": 3}, "contradict each other"),
    "label and an empty slot": ({"token_label": "app", "slot": 4}, "no token in slot 4"),
    "serial in another case": ({"token_serial": "BLANK"}, "no token with serial number 'BLANK'; it has: .*'blank'"),
    "URI of another model": ({"token_uri": "pkcs11:token=app;model=other"}, "no token 'app' of model 'other'"),
}


@gcc
@pytest.mark.parametrize(("arguments", "reason"), REFUSED.values(), ids=REFUSED)
def test_unmatched_attributes_are_refused_with_a_list(refusal: Open, arguments: dict[str, Any], reason: str) -> None:
    """The list has the attributes that a caller can choose by."""
    assert re.search(reason, refusal(**arguments))


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "pass token_label, token_serial, slot or token_uri"),
    "empty label": ({"token_label": ""}, "token_label must not be empty"),
    "label of spaces": ({"token_label": "  "}, "token_label must not be empty"),
    "empty serial": ({"token_serial": ""}, "token_serial must not be empty"),
    "serial of spaces": ({"token_serial": " " * 16}, "token_serial must not be empty"),
    "negative slot": ({"slot": -1}, "slot must be an ID from 0"),
    "slot beyond CK_ULONG": ({"slot": 2**64}, "slot must be an ID from 0"),
    "slot as text": ({"slot": "3"}, "slot must be an integer"),
    "slot as truth": ({"slot": True}, "slot must be an integer"),
    "URI beside another label": (
        {"token_uri": "pkcs11:token=a", "token_label": "b"},
        "requires the label 'a', and another",
    ),
    "URI of another scheme": ({"token_uri": "http:token=a"}, "does not begin with pkcs11:"),
    "URI without attributes": ({"token_uri": "pkcs11:"}, "no token is chosen; pass token_label"),
    "URI with an empty label": ({"token_uri": "pkcs11:token="}, "token of token_uri must not be empty"),
    "URI with one attribute twice": ({"token_uri": "pkcs11:token=a;token=a"}, "unknown, that occurs twice"),
    "URI with a key": ({"token_uri": "pkcs11:token=a;object=key"}, "object, which is not read; pass key_label"),
    "URI with a library": ({"token_uri": "pkcs11:token=a?module-path=/x"}, "module-path, which is not read"),
    "URI with a bad slot": ({"token_uri": "pkcs11:slot-id=0x3"}, "slot-id of token_uri is not a decimal number"),
    "URI that is not UTF-8": ({"token_uri": "pkcs11:token=%ff"}, "not UTF-8"),
}


@pytest.mark.parametrize(("arguments", "reason"), INVALID.values(), ids=INVALID)
def test_arguments_that_choose_nothing_are_refused(arguments: dict[str, Any], reason: str) -> None:
    """The refusal comes before the library is loaded."""
    with pytest.raises((ValueError, TypeError), match=reason):
        Pkcs11Module.open("/nowhere", key_label="key", **arguments)


@pytest.mark.parametrize("name", ["pin-value", "PIN-value", "pinvalue", "pin-source", "token=x;token"])
def test_a_refused_uri_never_shows_its_values(name: str) -> None:
    """One of them may be a PIN."""
    with pytest.raises(ValueError, match="token_uri has") as caught:
        TokenChoice.of(label=None, serial=None, slot=None, uri=f"pkcs11:serial=1;{name}=86420?{name}=86420")
    assert "86420" not in str(caught.value)


texts = st.sampled_from(["a", "b", " a", "", "a\0", "ab"])
found_tokens = st.lists(st.tuples(texts, texts), max_size=4).map(
    lambda pairs: [FoundToken(slot, *pair, "m", "n", True, slot) for slot, pair in enumerate(pairs)]
)


@given(found_tokens, st.none() | st.just("a"), st.none() | st.just("b"), st.none() | st.integers(0, 4))
def test_the_one_token_that_has_all_attributes_is_chosen(
    found: list[FoundToken], label: str | None, serial: str | None, slot: int | None
) -> None:
    """A token that lacks an attribute is never chosen, and neither is one of two that match."""
    assume((label, serial, slot) != (None, None, None))
    fitting = [
        each.token
        for each in found
        if (label is None or each.label.strip(" \0") == label)
        and (serial is None or each.serial.strip(" \0") == serial)
        and slot in (None, each.slot)
    ]
    choice = TokenChoice.of(label=label, serial=serial, slot=slot, uri=None)
    try:
        assert [choose(choice, "lib", found, dict)] == fitting
    except ModuleError:
        assert len(fitting) != 1


def test_real_tokens_of_one_label_open_by_serial_slot_and_uri(
    softhsm_token: RealToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the arguments that open each of two tokens, and each keeps its key pair, also after a reset."""
    softhsm_token.open().close()  # so that there is something to finalise
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SOFTHSM2_CONF", "")  # to be set back
        twin = tokens.softhsm(tmp_path, "twin", "twin")[0]
        softhsm_token.finalize()
        with pytest.raises(ModuleError, match="has 2 tokens 'twin'") as caught:
            twin.open()
        listed = re.findall(r"slot (\d+), serial number '(\w+)'", str(caught.value))
        assert len(listed) == 2
        keys = set()
        for slot, serial in listed:
            common: dict[str, Any] = {"key_label": "key", "pin_file": twin.pin_file}
            module = Pkcs11Module.open(twin.library, token_serial=serial, generate=True, **common)
            key, _ = tokens.imported(module)
            twin.finalize()
            module.encrypt(key, b"x")
            keys.add(module.public_key_blob)
            for other in ({"slot": int(slot)}, {"token_uri": f"pkcs11:token=twin;serial={serial}"}):
                again = Pkcs11Module.open(twin.library, **other, **common)
                assert again.public_key_blob == module.public_key_blob
                again.close()
            module.close()
        assert len(keys) == 2
    softhsm_token.finalize()
    softhsm_token.open().close()
