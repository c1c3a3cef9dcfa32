"""`keyferry-agent unseal`: send the secret that opens the keyring to a running agent whose `unseal` is "manual".

The command writes the secret into a pipe, and sends the pipe's reading end to the agent (see `daemon.unsealing`). The secret is
never an argument.
"""

import argparse
import fcntl
import getpass
import json
import os
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import Any, Final

from keyferry import arguments as reading
from keyferry import private_files
from keyferry.stdout import complain, show

from ..config import validators
from ..config.settings import DEFAULT_UNSEAL_SOCKET

__all__ = ["add_parser"]

FAILED: Final = 1
_PROGRAM: Final = "keyferry-agent"
_UCRED: Final = struct.Struct("iII")
_MAX_SECRET: Final = 65_536
"""Bytes: the size limit of an identity file, and the capacity of the pipe, which one write must not exceed."""
_MAX_ANSWER: Final = 65_536
_TIMEOUT_SECONDS: Final = 660.0
"""Time limit for the agent to open the keyring: covers the loader's time limits, and an earlier attempt in progress."""


class UnsealError(Exception):
    """The agent was not unsealed. The message contains the reason and a remedy."""


def add_parser(commands: Any) -> None:
    """Add `unseal` to the agent's command."""
    parser = commands.add_parser(
        "unseal",
        help='send the secret that opens the keyring to a running agent (unseal = "manual")',
        description="Send the secret that opens the keyring to a running agent.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--secret",
        default="-",
        metavar="FILE",
        help='an age or SSH identity, or a passphrase file; "credential:NAME" for one of systemd; default: standard input',
    )
    parser.add_argument(
        "--socket",
        type=reading.socket,
        default=str(DEFAULT_UNSEAL_SOCKET),
        metavar="PATH",
        help=f"the agent's unseal_socket (default {DEFAULT_UNSEAL_SOCKET})",
    )
    parser.set_defaults(run=_main)


def _main(arguments: argparse.Namespace) -> int:
    try:
        answer = _unseal(arguments.socket, arguments.secret)
    except UnsealError as error:
        complain(_PROGRAM, str(error))
        return FAILED
    keys = answer["Keys"]
    return show(_PROGRAM, f"unsealed: {keys} {'key' if keys == 1 else 'keys'}, loaded {answer['KeyringLoadedAt']}")


def _unseal(path: str, secret: str) -> dict[str, Any]:
    """Send the secret to the agent, and return its answer. Raises `UnsealError`.

    Connects first, so that the secret is read only if an agent accepts connections.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.settimeout(_TIMEOUT_SECONDS)
        try:
            agent.connect(path)
        except OSError as error:
            raise UnsealError(
                f'{path}: {error.strerror}; is the agent running, with unseal = "manual", and are you root or its user?'
            ) from None
        reader = _pipe_with(_read(secret, _agent_user(agent, path)))
        try:
            socket.send_fds(agent, [b"\0"], [reader])
            os.close(reader)
            reader = -1
            answer = b""
            while len(answer) < _MAX_ANSWER and (part := agent.recv(_MAX_ANSWER)):
                answer += part
        except OSError as error:
            raise UnsealError(f"{path}: {error.strerror or 'the agent does not answer'}") from None
        finally:
            if reader >= 0:
                os.close(reader)
    try:
        result: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise UnsealError(
            f"{path}: the agent closed the connection without an answer; its log has the reason"
        ) from None
    if "Error" in result:
        raise UnsealError(f"not unsealed: {result['Error']}")
    return result


def _agent_user(agent: socket.socket, path: str) -> int:
    """Return the user of the listening process. Raises `UnsealError` if another user may have replaced the agent's socket."""
    _, uid, _ = _UCRED.unpack(agent.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    folder = Path(path).absolute().parent
    status = folder.stat()
    if uid not in (0, os.geteuid(), status.st_uid):
        raise UnsealError(f"{path}: user {uid} listens there, but does not own {folder}; the secret was not sent")
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise UnsealError(f"{folder}: all users can replace the socket there; chmod o-w {folder}")
    return int(uid)


def _read(source: str, uid: int) -> bytearray:
    """Return the secret. A file must be private to root, this user or the agent's user. Raises `UnsealError`."""
    if source == "-" and sys.stdin is not None and sys.stdin.isatty():
        return bytearray(getpass.getpass("Unseal secret: ").encode(errors="surrogateescape"))
    try:
        path = Path("/dev/stdin")
        if source != "-":
            path = validators.unseal(source if source.startswith("credential:") else os.path.abspath(source))
        with open(0 if source == "-" else path, "rb", buffering=0, closefd=source != "-") as file:
            private_files.check(file.fileno(), path, secret=True, owners=(uid,))
            secret = bytearray(_MAX_SECRET + 1)
            size = 0
            while size < len(secret) and (count := file.readinto(memoryview(secret)[size:])):
                size += count
    except OSError as error:
        raise UnsealError(f"{source}: {error.strerror}") from None
    except (private_files.PrivateFileError, ValueError) as error:
        raise UnsealError(str(error)) from None
    if size > _MAX_SECRET:
        raise UnsealError(f"{source}: longer than {_MAX_SECRET} bytes, the limit for an identity or passphrase")
    if not size:
        raise UnsealError(f"{source}: empty; expected an age identity, an SSH key or a passphrase")
    del secret[size:]
    return secret


def _pipe_with(secret: bytearray) -> int:
    """Return the reading end of a pipe that holds the secret, and overwrite `secret` with zeros. Raises `UnsealError`."""
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _MAX_SECRET)
        os.set_blocking(writer, False)
        written = os.write(writer, secret)
        complete = written == len(secret)
    except OSError as error:
        os.close(reader)
        raise UnsealError(f"a pipe cannot hold the secret: {error.strerror}") from None
    finally:
        os.close(writer)
        secret[:] = bytes(len(secret))
    if not complete:
        os.close(reader)
        raise UnsealError("a pipe cannot hold the secret")
    return reader
