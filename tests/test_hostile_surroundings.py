"""Surroundings that fail a running agent: descriptors, disks, files, clocks. It says so, refuses what it must, and recovers."""

import errno
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.agent import RawConnection
from support.keyring import serving

from keyferry_agent.peer import Process, evidence

DESCRIBE = ("DescribeKey", {"KeyId": "alias/a"})


def few(descriptors: int) -> Callable[[], None]:
    """A limit, to be set in a process that is about to be the agent."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))


@pytest.mark.parametrize("descriptors", [40, 41])
def test_without_descriptors_nobody_is_taken_for_somebody_else(
    keyring: Path, socket_path: Path, descriptors: int
) -> None:
    """A connection whose process cannot be held is refused as what it is: it is not one that was granted nothing."""
    this = f'exe="{os.path.realpath(sys.executable)}"'
    with serving(keyring, socket_path, to=this, preexec=few(descriptors)) as agent, ExitStack() as stack:
        codes: list[str] = []
        while not codes or codes[-1] == "OK":
            connection = stack.enter_context(RawConnection(agent.socket))
            error = connection.call(*DESCRIBE).error
            codes.append(error["Code"] if error else "OK")
        assert len(codes) > 5
        assert error is not None
        assert "descriptor" in error["Message"], codes


@contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """Leave this process so many descriptors to open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, before[1]))
        while True:
            try:
                opened.append(os.dup(0))
            except OSError:
                break
        for _ in range(descriptors):
            os.close(opened.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for each in opened:
            os.close(each)


@pytest.mark.parametrize("left", [0, 1])
def test_evidence_that_no_descriptor_is_left_for_is_an_error_and_leaks_none(left: int) -> None:
    """Neither a process that is not held, nor one without its control groups."""
    here, there = socket.socketpair()
    with here, there:
        before = len(os.listdir("/proc/self/fd"))
        with room_for(left), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            evidence(here, "default")
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.EINVAL, ProcessLookupError), (errno.ESRCH, ProcessLookupError), (errno.EMFILE, OSError)],
)
def test_a_number_is_looked_up_only_where_the_kernel_has_no_handle(number: int, raised: type[OSError]) -> None:
    """Where it has one, and gives none, the number may be another process's by now."""
    with pytest.raises(raised) as error:
        Process.of(_Answering(number), os.getpid())
    assert type(error.value) is raised
    held = Process.of(_Answering(errno.ENOPROTOOPT), os.getpid())
    assert held is not None
    held.close()


class _Answering:
    """A socket on a kernel that answers everything with an error."""

    def __init__(self, number: int) -> None:
        self._number = number

    def getsockopt(self, _level: int, _name: int, _length: int, /) -> bytes:
        """Answer."""
        raise OSError(self._number, os.strerror(self._number))
