"""Handlers: from an operation to its answer, in terms of keyring, grants and crypto. Synchronous, without sockets or trio.

A handler works in two steps. The first step, on the event loop, decides the request: it checks the parameters, then the grant,
then the key and its state. Meanwhile `Request` collects the fields of the audit entry. The handler returns a `Job`, whose `run`
is the second step: the cryptography, synchronously, with key bytes in secret memory only. If the job's `offload` is set, the
dispatcher runs the job in a thread. Only this file knows of a DryRun: it runs `verify` of the job instead.

To add an operation: declare it in `keyferry.operations`, write its handler in one of these modules, name it in `HANDLERS`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from keyferry import operations
from keyferry.errors import KmsError, kms_error
from keyferry.parameters import DRY_RUN

from .. import health
from ..audit.entry import AuditEntry
from ..authz.caller import Caller
from ..state import ServerState
from .common import Job, PreparedRequest, Request
from .data_keys import generate_data_key, generate_data_key_without_plaintext
from .encryption import decrypt, encrypt, re_encrypt
from .export import export_data_key, generate_and_export_data_key
from .listing import list_aliases, list_key_versions, list_keys
from .status import describe_key, get_agent_health, get_agent_status

__all__ = ["HANDLERS", "Job", "PreparedRequest", "prepare"]

HANDLERS: Final[Mapping[str, Callable[[Request], Job]]] = {
    "GenerateAndExportDataKey": generate_and_export_data_key,
    "ExportDataKey": export_data_key,
    "GenerateDataKey": generate_data_key,
    "GenerateDataKeyWithoutPlaintext": generate_data_key_without_plaintext,
    "Encrypt": encrypt,
    "Decrypt": decrypt,
    "ReEncrypt": re_encrypt,
    "DescribeKey": describe_key,
    "ListKeys": list_keys,
    "ListKeyVersions": list_key_versions,
    "ListAliases": list_aliases,
    "GetAgentStatus": get_agent_status,
    "GetAgentHealth": get_agent_health,
}
_WITHOUT_KEYRING: Final = frozenset({"GetAgentStatus", "GetAgentHealth"})
"""Operations that a sealed agent answers."""


def prepare(agent: ServerState, caller: Caller, method: str, params: Mapping[str, Any]) -> PreparedRequest:
    """Decide a request. Returns the job that does the cryptography, or an error, with the audit entry. Raises nothing."""
    operation = operations.OPERATIONS.get(method)
    if operation is None:
        return PreparedRequest(kms_error("InvalidAction.NotFound"), AuditEntry.of_method(method))
    request = Request(agent, caller, operation)
    try:
        if not operation.dry_run or not _asks_for_dry_run(params):
            job = _decide(request, params)
        else:
            with _dry_run_codes():
                job = _dry_run(_decide(request, params))
    except Exception as error:  # of a fault, too, the entry has the fields that were known before
        return PreparedRequest(error, request.entry())
    return PreparedRequest(job, request.entry())


def _decide(request: Request, params: Mapping[str, Any]) -> Job:
    operation = request.operation
    request.values = operation.check(params)
    if request.agent.keyring.is_sealed and operation.name not in _WITHOUT_KEYRING:
        raise kms_error("ServiceUnavailableTemporary", f"The agent is sealed: {health.MESSAGES[health.SEALED]}.")
    return HANDLERS[operation.name](request)


# The codes that replace a refusal's code with DryRun; other failures keep their own code.
_DRY_RUN_CODES: Final = {
    "MissingParameter": "ValidationError",
    "InvalidParameter": "ValidationError",
    "Forbidden.NoPermission": "AccessDeniedError",
}


def _asks_for_dry_run(params: Mapping[str, Any]) -> bool:
    value = params.get(DRY_RUN.name)
    try:
        return bool(value) and DRY_RUN.check(DRY_RUN.name, value)
    except KmsError:
        return False  # `Operation.check` refuses the invalid value together with the other parameters


def _dry_run(job: Job) -> Job:
    """Return the job of a DryRun: it verifies, and ends with the error that means success.

    It wraps nothing, which alone takes so long that a job is offloaded.
    """

    def run() -> None:
        with _dry_run_codes():
            if job.verify is not None:
                job.verify()
        raise kms_error("DryRunOperationError")

    return Job(run)


@contextmanager
def _dry_run_codes() -> Iterator[None]:
    try:
        yield
    except KmsError as error:
        code = _DRY_RUN_CODES.get(error.code)
        raise kms_error(code, error.message) if code else error from None
