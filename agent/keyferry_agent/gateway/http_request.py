"""A whole HTTP request of a gateway, with its decoded parameters. No I/O."""

from dataclasses import dataclass, field
from typing import Final

from .head import Head
from .parameters import decode_form, merged
from .refusals import refusal

__all__ = ["HttpRequest", "Reception", "check_host", "check_target"]

FORM: Final = "application/x-www-form-urlencoded"
_METHODS: Final = ("GET", "POST")
_BROWSER_HEADERS: Final = ("origin", "sec-fetch-site")
"""Headers that only browsers send. Node's fetch sends Sec-Fetch-Mode, so that header is not among them."""
OWN_HOSTS: Final = ("127.0.0.1", "[::1]", "localhost")


@dataclass(slots=True)
class Reception:
    """A request as it was received: its head, and its body."""

    head: Head
    body: bytes

    @property
    def host(self) -> str:
        """The value of Host."""
        return self.head.value("host")


def check_host(reception: Reception, hosts: tuple[str, ...]) -> None:
    """Raise `KmsError` unless Host is one of `hosts` or a name of this host, with any port or none."""
    name = reception.host.lower()
    host, colon, port = name.rpartition(":")
    if not colon or not port.isdecimal() or not port.isascii() or (":" in host and not host.endswith("]")):
        host = name
    if host not in {*OWN_HOSTS, *(allowed.lower() for allowed in hosts)}:
        raise refusal("InvalidProduct.NotFound")


def check_target(reception: Reception) -> None:
    """Raise `KmsError` for a browser, another method than GET and POST, or another path than `/`."""
    if any(reception.head.values(header) for header in _BROWSER_HEADERS):
        raise refusal("Forbidden.NoPermission", "Requests from browsers are refused.")
    if reception.head.method not in _METHODS:
        raise refusal("UnsupportedHTTPMethod")
    if reception.head.target.partition("?")[0] != "/":
        raise refusal("InvalidAction.NotFound")


@dataclass(slots=True)
class HttpRequest:
    """A request with its parameters. `query`: the parameters of the query alone, which the second scheme signs."""

    method: str
    headers: dict[str, list[str]]
    body: bytes = field(repr=False)
    query: list[tuple[str, str]] = field(repr=False)
    parameters: dict[str, str] = field(repr=False)

    @classmethod
    def of(cls, reception: Reception) -> "HttpRequest":
        """Return the request with its decoded parameters.

        Raises `UnsupportedContentType` for a body that is not a form, and `InvalidParameter`.
        """
        head, body = reception.head, reception.body
        query = decode_form(head.target.partition("?")[2].encode("ascii"))
        form = []
        if body:
            if head.value("content-type").partition(";")[0].strip().lower() != FORM:
                raise refusal("UnsupportedContentType")
            form = decode_form(body)
        return cls(head.method, head.headers, body, query, merged([*query, *form]))

    def header_values(self, name: str) -> list[str]:
        """Return the values of all headers with this name, in lower case."""
        return self.headers.get(name, [])

    def header(self, name: str) -> str:
        """Return the value of the first header with this name; an empty text without one."""
        values = self.headers.get(name)
        return values[0] if values else ""
