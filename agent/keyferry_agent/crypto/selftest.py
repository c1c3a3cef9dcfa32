"""Known-answer tests, run at every start: a library that computes wrong results must not process a key.

Each check decrypts a published or frozen vector. Where encryption is randomised, the check also encrypts and decrypts once.
"""

from base64 import b64decode

from cryptography.exceptions import InternalError, UnsupportedAlgorithm

from keyferry import libcrypto, openssl_configuration
from keyferry.secret import SecretMemory
from keyferry.sm2_ciphertext import der_to_raw, raw_to_der

from . import ciphertext_blob, wrapping
from .public_key import PublicKeyError

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

# A key for this test only, and 00 01 02 ... encrypted to it by `cryptography`; openssl and pycryptodomex decrypt both.
_RSA_PKCS8 = (
    "MIIEvAIBADANBgkqhkiG9w0BAQEFAASCBKYwggSiAgEAAoIBAQC6KgFvFqkmTTJVydBxGu2Qw0w2HELTwHz7TD6x2qtTypDgJDROEr/zQZOx2t5M"
    "XW/OEU9sZsxzwqpA5Om5Hn79jRuXul/MkCygzHLbY8Ub6/YWjOQ6aDRyI95ZrneGDfQkqmrRGrBRJLOngkknyxHvSkg9xTvJ2M/M6Ud4PhYo18mc"
    "Zl+jv7YZfg6cvHXaPh31uZa1NE0BPboGPn3bTIp7FhOUxu9m3Q6Ft29eok6JnfCaNEFEx2eUYqvT1bD95bpJkEhYrsiUa8FTIW9yQcTILagAQF6k"
    "cEKFWDUrunKrU5tnm+Ilc7u1fWHd87UBJ7jdssRbyfMV1hJrRfxTPSjDAgMBAAECggEASOmSzjON5FZv1HHKlcH6MayL+NVwxwao7LOcCoSefZ7k"
    "xyTm530oeNnCQvJ6BmbCF29oMAjDIsOncus1Ly/mhN/zYqW4R6JgGEp64bpdxOXR6FseOFH/2IR73ZwbbAGjEYk9dNCDJgS96Gl6xX8fcx0g1jCd"
    "jhzApnznZQzMGQpepwfm+NEtCVixR2mEVaJqLJrileutPrZc6gqaF4VtO7ohR8z0Xf1+ff7goB80H/eL2ga2T0DpBA5Fp7d/tLcmbXD3k+Herdoq"
    "vYhBGtmHyT6Gb5IO43HVHa4VShNd5m0XCgqWzPNzqhYKOeDwep0I4ylEZuYHiONTwvSgna5mgQKBgQD3y4wZ2gnV+i9TqhzNh4q5TMDhW1xoiWIV"
    "7zSkVEw6VqNJfkK4e3T/SS2U/obtwT+AODEnCjURVicn7ctx84F05GNsxMwxH4vmMIWznptpSx9q72FmJ+ZP1gw/n/+LOuPkRKj95a4IxSeLEbO9"
    "wvK8MTDg8/fH19+jIJA0yjj/UQKBgQDAVAni1/N+Rueym928MuC2+KEb80sI8ok5P+9Hagr/RALL+84YuvThcXbWWylrFWhVo190K5RJ/GoYKjUZ"
    "I526HodoMhcle2ibWP5x87LHLLnTcgxEB+GrW+0Z961CsujwUDZYEOoJS0bV9fzCvzWM7cClXmG5J+mfTS38A0Lp0wKBgFIwAAr/B64iKhpc3OrK"
    "nxdwvrTAYbkGgDL4QQSUNShQXh5dM3IO+LJHqke12Dj5lL9JY/wn5YwXgCs9MvJbqr+DlPqZl4Rfiz5RL7dwzukwkn4cYbjJWRl3zF46Cj86zCWF"
    "JGv6Byw/gCsfNvektm/2/NhP8wokrrdjcJEh1Z/RAoGAVHfUS7OKdkhP1ErOTKyPsuxpXawxpUFX8TPaNCQnpkrJa6swrf3WNPkvNx+chjJFu27g"
    "KlZFb2UTd396CIty514nHCT7s3OK0sd4ILXmK8HB71KkfnBztV3POVtk1elbkse3xl/PWbuc5bV+iE2QCFAXDsnv43DbEyLDcm5AQg8CgYBI/aJG"
    "VIfehzcmeRxG+gy7QJiK6Cgm9DNdxWX7e85lR1FJHyPt+iyquxZdLlA63i1tZLeFZe5C4PoEw1ryk5UjnHXn8HuzZYRlgomICVEi9lIIiW2rTtrn"
    "5kbN3McbSw3lFhYINGFLBQyQEd0c4sSJxIaqkGBvzWA1h/VaPo7+pA=="
)
_RSA_MESSAGE = bytes(range(32))
_RSA_DIGESTS = {"RSAES_OAEP_SHA_256": b"sha256", "RSAES_OAEP_SHA_1": b"sha1"}
_RSA_CIPHERTEXTS = {
    "RSAES_OAEP_SHA_256": (
        "H+YAxSIBzTailLf2UmAkmtXmnU8H53Ximiy4C1DRrVl4B+2BwI8yVvW3+hfnwtozjf0qYTZPFpUf5g/LJRFoWRUxvZYgFWyb0IQio+NoIYj7U5kG"
        "ssL66yz9AIY9UVQu4wStAAbMsr5LjSd756NXaDIosrFZP8IqjKnK1Va5i1Ymb1YMjkkkaW30alTGNnxpRylb3AN+J4xytezjpqnk1SYAKMB/bTXp"
        "G7gLkf1umxVev9HL4Ai7JvtilJY7j+lktUqEkGgBnlLMRz+gi9suLlz4jsKdIpVKjOyDE9bf/jyScOrWbZFnbYVvAj7xaCBrJKGUFllVoSY9zMaT"
        "yAKGSg=="
    ),
    "RSAES_OAEP_SHA_1": (
        "Q90s+4E/Xk7IKdwDV+c4CBoPnod6cfZk2hlutv3U+PXHXEf9II+Ty+tC+kXCjl54UYMMYKfpor5RWIBlojCUs0Xba4vfjsPlq2x8T2GkkyMrMdx7"
        "aeDtb/AphnGDkp6jMkBla1sTIix13o/OU4koVPaxyvLCQW5vINlrvlgzg+HBa4VkSF6NFpzMN3DxSEISykcETfL3eOed4Ma+F9HKWlxXfY/A42JD"
        "l5DApDAkwzSNb1mnq76kmJrYJOjzr7zoWsx9xs47ATINpUoeMng9FoWjwqTfMcbALrpD74rUeKAsrQeFM3GN7obpUCYiTS0YAnFNulDhHoN1v9EC"
        "NL+84A=="
    ),
}

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


_NEEDED = (("RSA_2048", "RSAES_OAEP_SHA_256"),)
"""Pairs of WrappingKeySpec and WrappingAlgorithm without which the agent does not start."""


class SelfTestError(Exception):
    """A library returned a wrong result, or does not offer a required algorithm. The message names the algorithm."""


def run(scratch: SecretMemory, *, sm2_fallback: bool) -> list[str]:
    """Check all algorithms of the agent; return one message for each algorithm that the system does not offer.

    Raises `SelfTestError` for a wrong result, and if the system does not offer AES-256 or RSA with OAEP and SHA-256.
    """
    messages = []
    for key_spec, known_blob in _SEALED.items():
        try:
            _check_seal(key_spec, bytes.fromhex(known_blob), scratch)
        except (InternalError, UnsupportedAlgorithm) as error:
            failure = f"{key_spec}: {openssl_configuration.cryptography_failure(error)}"
            if key_spec == "Aliyun_AES_256" or isinstance(error, InternalError):
                raise SelfTestError(failure) from None
            messages.append(failure)
    for pair, way in wrapping.TABLE.items():
        algorithm = way.missing()
        if algorithm is None:
            _check_sm2() if pair[0] == "EC_SM2" else _check_rsa(*pair, scratch)
        elif pair in _NEEDED:
            raise SelfTestError(
                f"{way.name}: {libcrypto.why_missing(algorithm)} ({openssl_configuration.configuration()})"
            )
        elif pair[0] == "EC_SM2" and sm2_fallback:
            _check_sm2_gmssl()
        else:
            messages.append(_unavailable(pair[1], algorithm))
    return messages


def _unavailable(algorithm: str, library_algorithm: str) -> str:
    hint = '; sm2_fallback = "gmssl" is the slow way' if library_algorithm == "SM2" else ""
    why = f"{libcrypto.why_missing(library_algorithm)} ({libcrypto.version()}; {openssl_configuration.configuration()})"
    return f"{algorithm} is not available without {library_algorithm}: {why}{hint}"


def _check_seal(key_spec: str, known_blob: bytes, scratch: SecretMemory) -> None:
    cmk = memoryview(bytearray(range(ciphertext_blob.KEY_SIZES[key_spec])))
    plaintext = memoryview(bytearray(_PLAINTEXT))
    blob = ciphertext_blob.bind(key_spec, _VERSION, _KEY, {}).encrypt(cmk, plaintext, scratch, _SALT)
    if blob != known_blob:
        raise SelfTestError(f"{key_spec}: a CiphertextBlob does not have the bytes it must have")
    plaintext_buffer = bytearray(len(_PLAINTEXT))
    try:
        ciphertext_blob.decrypt_into(key_spec, cmk, known_blob, _KEY, {}, memoryview(plaintext_buffer), scratch)
    except ciphertext_blob.BlobError:
        raise SelfTestError(f"{key_spec}: a CiphertextBlob does not open") from None
    if plaintext_buffer != _PLAINTEXT:
        raise SelfTestError(f"{key_spec}: a CiphertextBlob opens to something else")


def _check_rsa(key_spec: str, algorithm: str, scratch: SecretMemory) -> None:
    way = wrapping.TABLE[key_spec, algorithm]
    digest = _RSA_DIGESTS[algorithm]
    try:
        key = libcrypto.private_key(bytearray(b64decode(_RSA_PKCS8)))
        ciphertext = wrapping.recipient(way, key.public_der(), sm2_fallback=False).wrap(
            memoryview(bytearray(_RSA_MESSAGE)), scratch
        )
        for wrapped_key in (b64decode(_RSA_CIPHERTEXTS[algorithm]), ciphertext):
            buffer = bytearray(256)
            size = key.decrypt_into(bytearray(wrapped_key), buffer, libcrypto.oaep(digest))
            if buffer[:size] != _RSA_MESSAGE:
                raise SelfTestError(f"{algorithm}: a known ciphertext decrypts to something else")
    except (libcrypto.LibcryptoError, wrapping.WrappingError, PublicKeyError) as error:
        raise SelfTestError(f"{algorithm}: {error} ({openssl_configuration.configuration()})") from None


def _check_sm2() -> None:
    pkcs8 = bytearray.fromhex(_SM2_PKCS8_PREFIX + _SM2_D + _SM2_PKCS8_MIDDLE + _SM2_POINT)
    try:
        key = libcrypto.private_key(pkcs8)
        for ciphertext in (bytes.fromhex(_SM2_CIPHERTEXT), der_to_raw(key.encrypt(bytearray(_SM2_MESSAGE)))):
            buffer = bytearray(256)
            size = key.decrypt_into(bytearray(raw_to_der(ciphertext)), buffer)
            if buffer[:size] != _SM2_MESSAGE:
                raise SelfTestError("SM2PKE: the vector of GB/T 32918.5 decrypts to something else")
    except (libcrypto.LibcryptoError, ValueError) as error:
        raise SelfTestError(f"SM2PKE: {error}") from None


def _check_sm2_gmssl() -> None:
    from . import sm2_gmssl  # noqa: PLC0415 - as in `wrapping`

    d, point = int(_SM2_D, 16), bytes.fromhex(_SM2_POINT)
    for ciphertext in (bytes.fromhex(_SM2_CIPHERTEXT), sm2_gmssl.encrypt(point, bytearray(_SM2_MESSAGE))):
        try:
            plaintext = sm2_gmssl.decrypt(d, ciphertext)
        except ValueError as error:
            raise SelfTestError(f"SM2PKE (portable): {error}") from None
        if plaintext != _SM2_MESSAGE:
            raise SelfTestError("SM2PKE (portable): the vector of GB/T 32918.5 decrypts to something else")
