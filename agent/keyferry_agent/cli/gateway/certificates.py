"""A certificate authority for one certificate: its key is forgotten, and name constraints bind it to the gateway's names.

A client that trusts the authority trusts this one certificate: the authority's key is gone, and clients refuse names outside
of the constraints.
"""

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["DAYS", "Issued", "new_authority", "new_certificate", "parse_name"]

_Name: TypeAlias = x509.DNSName | x509.IPAddress

DAYS: Final = range(1, 826)
"""Days of validity. Apple's libraries refuse certificates of more than 825 days, also those of private authorities."""
_LOCAL: Final[tuple[_Name, ...]] = (
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
    x509.DNSName("localhost"),
)
"""The names that every certificate has."""
_PERMITTED: Final[tuple[_Name, ...]] = (
    x509.IPAddress(ipaddress.ip_network("127.0.0.0/8")),
    x509.IPAddress(ipaddress.ip_network("::1/128")),
    x509.DNSName("localhost"),
)
"""The constraints that every authority has."""
_CLOCK_SKEW: Final = timedelta(hours=1)
"""Validity begins earlier by this much, for clients whose clock is behind."""
_MAX_NAME_CHARACTERS: Final = 253
_MAX_QUOTED_CHARACTERS: Final = 60
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_AUTHORITY_USAGE: Final = ("key_cert_sign", "crl_sign")
_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class Issued(NamedTuple):
    """A certificate, and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate as PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key as PEM of PKCS #8, which is not encrypted."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def parse_name(text: str) -> _Name:
    """Return a host's name for a certificate: a DNS name, or an IP address. Raises ValueError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        name = text.lower()
        labels = name.split(".")
        is_name = len(name) <= _MAX_NAME_CHARACTERS and all(_LABEL.fullmatch(label) for label in labels)
        if is_name and not labels[-1].isdigit():  # some clients read a last label of digits as an IP address
            return x509.DNSName(name)
        shown = text[:_MAX_QUOTED_CHARACTERS]
        raise ValueError(f"a DNS name like kms.internal or an IP address is expected, not {shown!r}") from None


def new_authority(names: Sequence[_Name], days: int) -> Issued:
    """Return a fresh authority that can certify the local names and `names`, and no others."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC).replace(microsecond=0)
    # A random name, so that clients can trust several authorities of this kind.
    name = _common_name(f"Keyferry gateway CA {x509.random_serial_number():x}"[:36])
    constraints = x509.NameConstraints(list(dict.fromkeys([*_PERMITTED, *map(_subtree, names)])), None)
    certificate = (
        _unsigned(name, name, key, (now - _CLOCK_SKEW, now + timedelta(days=days)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**{usage: usage in _AUTHORITY_USAGE for usage in _USAGES}), critical=True)
        .add_extension(constraints, critical=True)
        .sign(key, hashes.SHA256())
    )
    return Issued(certificate, key)


def new_certificate(authority: Issued, names: Sequence[_Name]) -> Issued:
    """Return a fresh certificate for the local names and `names`, which is valid as long as the authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    issuer_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    # With spaces, so that no client takes the common name for the name of a host.
    subject = _common_name("Keyferry gateway")
    certificate = (
        _unsigned(subject, issuer.subject, key, (issuer.not_valid_before_utc, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{usage: usage == "digital_signature" for usage in _USAGES}), critical=True)
        .add_extension(x509.SubjectAlternativeName(list(dict.fromkeys([*_LOCAL, *names]))), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return Issued(certificate, key)


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, validity: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    """Return what both certificates have in common."""
    begin, end = validity
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _subtree(name: _Name) -> _Name:
    """Return the name as a constraint: an address becomes a network of this one address."""
    return x509.IPAddress(ipaddress.ip_network(name.value)) if isinstance(name, x509.IPAddress) else name
