"""The tests that start no process, which `make test-fast` runs (pytest's `--fast`).

A test starts a process where it, one of its fixtures, or a function of the tests that these use, names one of `STARTING`.
"""

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

import pytest

STARTING: Final = frozenset({"Popen", "fork", "load_keyring", "loader", "posix_spawn", "subprocess"})
"""Names that lead to another process: of the standard library, and of the product."""
SLOW: Final = frozenset(
    {"test_age_passphrase", "test_ciphertext", "test_fuzz", "test_passphrases", "test_simulation", "test_wycheproof"}
)
"""Modules whose tests take seconds of the processor all the same: scrypt, and inputs by the thousand."""
_OURS: Final = ("support", "test_", "tests.", "conftest", "simulation", "fuzz")


def is_fast(item: pytest.Item) -> bool:
    """Whether a test starts no process and takes no more than a moment."""
    if not isinstance(item, pytest.Function) or item.path.stem in SLOW:
        return False
    functions = [item.function]
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        functions += [definition.func for definition in definitions]
    return not any(map(starts, functions))


_known: dict[Any, bool] = {}


def starts(thing: Any) -> bool:
    """Whether a function or a class of the tests leads to another process."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if thing not in _known:
        _known[thing] = False  # for functions that call each other
        _known[thing] = any(_leads(name, where) for name, where in _names(thing))
    return _known[thing]


def _leads(name: str, where: dict[str, Any]) -> bool:
    if name in STARTING:
        return True
    value = where.get(name)
    is_ours = str(getattr(value, "__module__", "")).startswith(_OURS)
    return is_ours and isinstance(value, FunctionType | type) and starts(value)


def _names(thing: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names that a function, or a method of a class, uses, with the objects that hold them."""
    functions: Iterable[Any] = [thing]
    if isinstance(thing, type):
        functions = [inspect.unwrap(getattr(each, "__func__", each)) for each in vars(thing).values() if callable(each)]
    for function in functions:
        if isinstance(function, FunctionType):
            for name in _names_of_code(function.__code__):
                yield name, function.__globals__
                module = function.__globals__.get(name)
                if isinstance(module, ModuleType) and module.__name__.startswith(_OURS):
                    yield from ((other, vars(module)) for other in _names_of_code(function.__code__))


def _names_of_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of_code(constant)
