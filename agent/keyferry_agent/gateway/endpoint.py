"""From a received request to its encoded answer: verifies the signature, and has the operation decided by the dispatcher."""

import time
from typing import Final

import trio

from keyferry.errors import KmsError, kms_error
from keyferry.protocol import wire

from .. import health
from ..audit.entry import AuditEntry
from ..authz.caller import Caller
from ..peer import HttpOrigin, Peer
from ..server.dispatch import Dispatcher, Exchange, Message
from ..server.offloading import offload
from ..server.thread_pool import FairThreadPool
from ..state import ServerState
from .answers import ResponseEncoder
from .authentication import check_freshness, check_signature, response_format
from .client import Client
from .http_request import HttpRequest, Reception, check_host, check_target
from .nonces import Nonces
from .parameters import to_operation
from .refusals import HttpRefusal, refusal
from .sampling import Sample
from .signatures import Signed, operation_parameters, read_signature

__all__ = ["Endpoint"]

_MAX_WRONG_SIGNATURES: Final = 16
"""Wrong signatures on one connection. The connection is closed after the answer to the last one."""
_MAX_TEXT_LENGTH: Final = 128
"""Characters of a User-Agent, or of a claimed access key's ID, in an audit entry."""


class Endpoint:
    """Answers the requests of one gateway. `hosts`: names in Host besides those of this host."""

    def __init__(
        self,
        agent: ServerState,
        dispatcher: Dispatcher,
        pool: FairThreadPool,
        nonces: Nonces,
        sample: Sample,
        hosts: tuple[str, ...],
    ) -> None:
        self._agent = agent
        self._dispatcher = dispatcher
        self._pool = pool
        self._nonces = nonces
        self._sample = sample
        self._hosts = hosts

    async def answer(self, client: Client, reception: Reception) -> tuple[bytes, bool]:
        """Return the answer to a request, and whether the connection goes on after it.

        The answer is empty if the client's process has ended or runs another program now.
        """
        encoder = ResponseEncoder(reception.head, keep_alive=reception.head.keep_alive and not self._agent.draining)
        encoder.format = response_format("", reception.head.value("accept"))
        signed, is_verified = None, False
        try:
            request = self._request(reception, encoder)
            signed = read_signature(request)
            signed_at = self._verify(signed, encoder)
            is_verified = True
            access_key = self._agent.keyring.access_keys[signed.access_key_id]
            check_freshness(signed, access_key, signed_at, self._nonces)
        except KmsError as error:
            if error.code == "SignatureDoesNotMatch":
                client.wrong_signatures += 1
                encoder.keep_alive = encoder.keep_alive and client.wrong_signatures < _MAX_WRONG_SIGNATURES
            origin = _origin(client, reception, signed, is_verified=is_verified)
            access_key_id, action = (signed.access_key_id, signed.action) if signed and is_verified else ("", "")
            peer = client.peer._replace(access_key=access_key_id, http=origin)
            return self._refuse(peer, error, encoder, action), encoder.keep_alive
        del access_key  # it refers to a keyring that a reload may replace meanwhile
        client.proven = True
        encoder.action = signed.action
        caller = client.caller(signed.access_key_id, _origin(client, reception, signed, is_verified=True))
        answer = await self._decide(client, caller, signed, request, encoder)
        return answer, encoder.keep_alive and bool(answer)

    def refuse(self, client: Client, error: HttpRefusal) -> bytes:
        """Return the answer to bytes that are no valid request. The connection ends after it."""
        peer = client.peer._replace(http=_origin(client, None, None, is_verified=False))
        return self._refuse(peer, error.error, ResponseEncoder(None, keep_alive=False), "")

    def _request(self, reception: Reception, encoder: ResponseEncoder) -> HttpRequest:
        """Return the request with its parameters. Raises `KmsError`."""
        check_host(reception, self._hosts)
        encoder.host = reception.host
        check_target(reception)
        request = HttpRequest.of(reception)
        encoder.format = response_format(request.parameters.get("Format", ""), reception.head.value("accept"))
        return request

    def _verify(self, signed: Signed, encoder: ResponseEncoder) -> int:
        """Verify a request's signature, and return its timestamp in seconds since 1970. Raises `KmsError`."""
        if self._agent.keyring.is_sealed:
            raise kms_error("ServiceUnavailableTemporary", f"The agent is sealed: {health.MESSAGES[health.SEALED]}.")
        if not encoder.format:
            raise refusal("InvalidParameter.Format")
        _, signed_at = check_signature(signed, self._agent.keyring)
        return signed_at

    async def _decide(
        self, client: Client, caller: Caller, signed: Signed, request: HttpRequest, encoder: ResponseEncoder
    ) -> bytes:
        """Return the answer of the operation."""
        exchange = Exchange(caller, encode=encoder)
        try:
            parameters = to_operation(signed.action, operation_parameters(request, signed))
        except KmsError as error:
            self._dispatcher.refuse(exchange, error, AuditEntry.of_method(signed.action), limited=True)
            return exchange.answers
        exchange.pending.append(Message(0, None, wire.Request(0, signed.action, parameters)))
        del parameters
        generation = self._agent.generation
        if not await client.confirm():
            return b""
        finished = trio.Event()
        while not exchange.answers:
            if generation != self._agent.generation:  # a reload may have taken the access key away
                generation = self._agent.generation
                try:
                    self._check_again(signed)
                except KmsError as error:
                    self._dispatcher.refuse(exchange, error, AuditEntry.of_method(signed.action))
                    return exchange.answers
            self._dispatcher.run([exchange])
            if exchange.failure is not None:
                raise exchange.failure
            if exchange.offloaded:
                offload(self._agent, self._pool, exchange, finished.set)
                await finished.wait()
                finished = trio.Event()
                if not await client.confirm():
                    return b""
        return exchange.answers

    def _check_again(self, signed: Signed) -> None:
        access_key, _ = check_signature(signed, self._agent.keyring)
        if not access_key.description.enabled:
            raise refusal("Forbidden.AccessKey")

    def _refuse(self, peer: Peer, error: KmsError, encoder: ResponseEncoder, action: str) -> bytes:
        """Return the answer to a request that was refused before its operation was decided."""
        exchange = Exchange(Caller(peer), encode=encoder)
        recorded = self._sample.takes(time.monotonic())
        self._dispatcher.refuse(exchange, error, AuditEntry.of_method(action), recorded=recorded)
        return exchange.answers


def _origin(client: Client, reception: Reception | None, signed: Signed | None, *, is_verified: bool) -> HttpOrigin:
    user_agent = "" if reception is None else reception.head.value("user-agent")
    scheme, claimed = ("", "") if signed is None else (signed.scheme, "" if is_verified else signed.access_key_id)
    return HttpOrigin(scheme, client.remote, client.tls, _printable(user_agent), _printable(claimed))


def _printable(text: str) -> str:
    """Return the first 128 characters of a text, without those that are not printable ASCII."""
    text = text[:_MAX_TEXT_LENGTH]
    if text.isascii() and text.isprintable():
        return text
    return "".join(character for character in text if " " <= character <= "~")
