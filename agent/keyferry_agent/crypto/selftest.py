"""Known answers, checked at every start: a library that computes something else must not touch a key.

Each check decrypts a published or frozen vector, and where encryption is randomised, goes once round.
"""

from keyferry import libcrypto
from keyferry.secret import SecretMemory
from keyferry.sm2_ciphertext import der_to_raw, raw_to_der

from . import seal

__all__ = ["SelfTestError", "run"]

# GB/T 32918.5-2017, Annex C: encryption on the recommended curve. d, x ‖ y, M, and C as C1C3C2.
_SM2_D = "3945208F7B2144B13F36E38AC6D39F95889393692860B51A42FB81EF4DF7C5B8"
_SM2_POINT = (
    "09F9DF311E5421A150DD7D161E4BC5C672179FAD1833FC076BB08FF356F35020"
    "CCEA490CE26775A52DC6EA718CC1AA600AED05FBF35E084A6632F6072DA9AD13"
)
_SM2_MESSAGE = b"encryption standard"
_SM2_CIPHERTEXT = (
    "0404EBFC718E8D1798620432268E77FEB6415E2EDE0E073C0F4F640ECD2E149A73"
    "E858F9D81E5430A57B36DAAB8F950A3C64E6EE6A63094D99283AFF767E124DF0"
    "59983C18F809E262923C53AEC295D30383B54E39D609D160AFCB1908D0BD8766"
    "21886CA989CA9C7D58087307CA93092D651EFA"
)
# A PKCS #8 PrivateKeyInfo of that key, up to d.
_SM2_PKCS8_PREFIX = "308187020100301306072a8648ce3d020106082a811ccf5501822d046d306b0201010420"
_SM2_PKCS8_MIDDLE = "a14403420004"

# Frozen with format 0x01 (tests/vectors/ciphertext.json): master key 00 01 02 ..., no context.
_VERSION = "00000000-0000-4000-8000-000000000001"
_KEY = "00000000-0000-4000-8000-000000000002"
_SALT = bytes(range(0xA0, 0xC0))
_PLAINTEXT = b"keyferry self-test"
_SEALED = {
    "Aliyun_AES_256": (
        "30303030303030302d303030302d343030302d383030302d30303030303030303030303101a0a1a2a3a4a5a6a7a8a9aaabac"
        "adaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebf125b64866fbbe799ef34bc94a85373edb1e3fcbf839a61d95d99b072742994"
        "36886d142b34c4a17f8f891db9bd3f534df26bde18f5a5882c31fb3148cac5b066cf88"
    ),
    "Aliyun_SM4": (
        "30303030303030302d303030302d343030302d383030302d30303030303030303030303101a0a1a2a3a4a5a6a7a8a9aaabac"
        "adaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebf393e0226c9f03aa2e5717a20d4c981b8e1acec528d2cf855fd3dad36ae8498"
        "da6972e730e2293060f5c07bfcf4fc83383c7cf955fd84fde964034e117610093f7c49"
    ),
}


class SelfTestError(Exception):
    """A library gave a wrong answer. The message says which algorithm."""


def run(scratch: SecretMemory, *, sm2_fallback: bool) -> list[str]:
    """Check everything the agent computes with; give what is not available, a line each. Raises `SelfTestError`."""
    for key_spec, expected in _SEALED.items():
        _check_seal(key_spec, bytes.fromhex(expected), scratch)
    if libcrypto.has_sm2():
        _check_sm2()
        return []
    if not sm2_fallback:
        return [f'SM2PKE: {libcrypto.version()} was built without SM2; sm2_fallback = "gmssl" is the slow way']
    _check_sm2_portable()
    return []


def _check_seal(key_spec: str, expected: bytes, scratch: SecretMemory) -> None:
    cmk = memoryview(bytearray(range(seal.KEY_SIZES[key_spec])))
    plaintext = memoryview(bytearray(_PLAINTEXT))
    sealed = seal.bind(key_spec, _VERSION, _KEY, {}).seal(cmk, plaintext, scratch, _SALT)
    if sealed != expected:
        raise SelfTestError(f"{key_spec}: a CiphertextBlob does not have the bytes it must have")
    opened = bytearray(len(_PLAINTEXT))
    try:
        seal.open_into(key_spec, cmk, expected, _KEY, {}, memoryview(opened), scratch)
    except seal.SealError:
        raise SelfTestError(f"{key_spec}: a CiphertextBlob does not open") from None
    if opened != _PLAINTEXT:
        raise SelfTestError(f"{key_spec}: a CiphertextBlob opens to something else")


def _check_sm2() -> None:
    pkcs8 = bytearray.fromhex(_SM2_PKCS8_PREFIX + _SM2_D + _SM2_PKCS8_MIDDLE + _SM2_POINT)
    try:
        key = libcrypto.private_key(pkcs8)
        for sealed in (bytes.fromhex(_SM2_CIPHERTEXT), der_to_raw(key.encrypt(bytearray(_SM2_MESSAGE)))):
            opened = bytearray(256)
            size = key.decrypt_into(bytearray(raw_to_der(sealed)), opened)
            if opened[:size] != _SM2_MESSAGE:
                raise SelfTestError("SM2PKE: the vector of GB/T 32918.5 decrypts to something else")
    except (libcrypto.LibcryptoError, ValueError) as error:
        raise SelfTestError(f"SM2PKE: {error}") from None


def _check_sm2_portable() -> None:
    from . import sm2_portable  # noqa: PLC0415 - as in `wrapping`

    d, point = int(_SM2_D, 16), bytes.fromhex(_SM2_POINT)
    for sealed in (bytes.fromhex(_SM2_CIPHERTEXT), sm2_portable.encrypt(point, bytearray(_SM2_MESSAGE))):
        try:
            opened = sm2_portable.decrypt(d, sealed)
        except ValueError as error:
            raise SelfTestError(f"SM2PKE (portable): {error}") from None
        if opened != _SM2_MESSAGE:
            raise SelfTestError("SM2PKE (portable): the vector of GB/T 32918.5 decrypts to something else")
