"""The tests that `make test-fast` leaves out: those that start processes, found by the names that they use."""

import subprocess
from collections.abc import Callable

import pytest
from support import fast
from support.agent import RunningAgent, dev_agent
from support.fake_server import client_of
from support.keyring import new_keyring, serving


def runs_a_program() -> None:
    """Run a program."""
    subprocess.run(["true"], check=True)


def defines_a_function() -> object:
    """Define a function that would run a program."""

    def inner() -> None:
        runs_a_program()

    return inner


@pytest.mark.parametrize("thing", [RunningAgent, dev_agent, serving, runs_a_program, defines_a_function])
def test_a_helper_that_starts_a_process_is_found(thing: Callable[..., object]) -> None:
    """A start is found through functions, classes, context managers and nested functions."""
    assert fast.starts(thing)


@pytest.mark.parametrize("thing", [new_keyring, client_of])
def test_a_helper_that_starts_no_process_is_fast(thing: Callable[..., object]) -> None:
    """Files and threads are not processes."""
    assert not fast.starts(thing)


def test_tests_are_selected_by_the_processes_they_start(request: pytest.FixtureRequest) -> None:
    """This test starts no process; a test with the fixture of an agent does."""
    assert fast.is_fast(request.node)
    definitions = request._fixturemanager.getfixturedefs("agent", request.node)
    assert definitions is not None
    assert all(fast.starts(definition.func) for definition in definitions)
