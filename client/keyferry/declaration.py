"""Declares operations. A declaration provides the checks of an operation, its action, and a method of each client.

A request is a tuple whose fields are typed by `parameters`; a field without a default is required. A result is a tuple of the
answer's fields, which can be tuples too. Fields have the API's names in snake_case: `key_id` is KeyId on the wire.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from types import MethodType
from typing import Any, Final, Generic, NamedTuple, ParamSpec, Self, TypeVar, cast, get_args, get_type_hints, overload

from .errors import invalid_parameter, missing_parameter
from .parameters import DRY_RUN, Parameter, Values

_MAX_SHOWN_NAME: Final = 40
"""Characters of an unknown parameter's name in the message about it."""

P = ParamSpec("P")
R = TypeVar("R")


class Blocking(ABC):
    """A client whose methods block and return the result."""

    @abstractmethod
    def perform(self, operation: "Operation[..., R]", request: Any) -> R:
        """Send the request and return the result."""


class Awaiting(ABC):
    """A client whose methods are coroutines."""

    @abstractmethod
    async def perform(self, operation: "Operation[..., R]", request: Any) -> R:
        """Send the request and return the result."""


class Operation(Generic[P, R]):
    """One operation: its `name`, the `request` and `result` that declare it, and the attributes derived from them.

    As an attribute of a client's class, an operation is a method that takes the request's fields as keyword arguments.
    """

    def __init__(self, request: Callable[P, Any], result: type[R]) -> None:
        self.request = cast("type[Any]", request)
        self.result = result
        self.name: str = self.request.__name__
        self.action = f"kms:{self.name}"
        self.parameters: dict[str, Parameter[Any]] = {
            annotation.__metadata__[0].name: annotation.__metadata__[0]
            for annotation in self.request.__annotations__.values()
        }
        self.required = [
            wire_name(field) for field in self.request._fields if field not in self.request._field_defaults
        ]
        self.dry_run = DRY_RUN.name in self.parameters
        self.__doc__ = self.doc

    @property
    def doc(self) -> str:
        """The description of the operation, in a sentence or two."""
        return self.request.__doc__ or ""

    def __repr__(self) -> str:
        return f"Operation({self.name})"

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.method = self.__name__ = name

    @overload
    def __get__(self, caller: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self, caller: Blocking, owner: type[Any]) -> Callable[P, R]: ...
    @overload
    def __get__(self, caller: Awaiting, owner: type[Any]) -> Callable[P, Coroutine[Any, Any, R]]: ...
    def __get__(self, caller: Blocking | Awaiting | None, owner: type[Any]) -> Any:
        if caller is None:  # Client.decrypt, as pydoc reads it
            return self

        return MethodType(self, caller)  # Python binds functions so too; this is made at each call, so keep it cheap

    def __call__(self, caller: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Perform the operation with a client. The client's method calls this."""
        if args:
            raise TypeError(f"{self.name} takes its parameters as keyword arguments only")
        return caller.perform(self, self.request(*args, **kwargs))

    def check(self, params: Mapping[str, Any]) -> Values:
        """Check a request's parameters and return them in canonical form.

        Raises `MissingParameter` or `InvalidParameter`, with the parameter's name. An unknown name is refused, so that a
        misspelt EncryptionContext is never ignored. None counts as absent.
        """
        values: dict[str, Any] = {}
        for name, value in params.items():
            parameter = self.parameters.get(name)
            if parameter is None:
                raise invalid_parameter(
                    ascii(name[:_MAX_SHOWN_NAME])[1:-1], f"{self.name} does not have this parameter."
                )
            if value is not None:
                values[name] = parameter.check(name, value)
        for name in self.required:
            if name not in values:
                raise missing_parameter(name)
        return Values(values)


@functools.cache
def wire_name(field: str) -> str:
    """Return the API's name of a field: KeyId for key_id."""
    return "".join(part.capitalize() for part in field.split("_"))


# --- tuples to and from the wire --------------------------------------------------------------------------------------


def request_to_wire(request: Any) -> dict[str, Any]:
    """Return the parameters of a request tuple as a map for the wire, without those that are None or False."""
    return {
        name: value
        for name, value in zip(_wire_names(type(request)), request, strict=True)  # type: ignore[arg-type]  # types are hashable
        if value is not None and value is not False
    }


def result_to_wire(result: Any) -> dict[str, Any]:
    """Return a result tuple as a map for the wire: nested tuples become maps and arrays, and None is left out."""
    return {
        name: _to_wire(value) if isinstance(value, tuple) else value
        for name, value in zip(_wire_names(type(result)), result, strict=True)  # type: ignore[arg-type]  # types are hashable
        if value is not None
    }


@functools.cache
def _wire_names(kind: Any) -> tuple[str, ...]:
    return tuple(map(wire_name, kind._fields))


def _to_wire(value: Any) -> Any:
    return result_to_wire(value) if hasattr(value, "_fields") else [result_to_wire(entry) for entry in value]


def result_from_wire(kind: type[Any], answer: Mapping[str, Any]) -> Any:
    """Return the result tuple `kind` from an answer. Unknown fields are ignored, because a newer agent may send more.

    Raises KeyError when the answer lacks a field, and TypeError for a field of another type.
    """
    values: dict[str, Any] = {}
    for field, name, is_required, plain_type, convert in _conversions(kind):  # type: ignore[arg-type]  # types are hashable
        if is_required or name in answer:
            value = answer[name]
            if plain_type is not None and type(value) is not plain_type:
                raise TypeError(f"{plain_type.__name__} is expected, not {type(value).__name__}")
            values[field] = value if convert is None else convert(value)
    return kind(**values)


class _Field(NamedTuple):
    """How to convert one field of a result: its name on the wire, its plain type if it has one, and its conversion."""

    field: str
    name: str
    is_required: bool
    plain_type: type[Any] | None
    convert: Callable[[Any], Any] | None


@functools.cache
def _conversions(kind: type[Any]) -> tuple[_Field, ...]:
    """Return how to convert each field of a result. Cached: reading the declaration takes longer than an answer."""
    return tuple(
        _Field(
            field,
            wire_name(field),
            field not in kind._field_defaults,
            hint if hint in (str, int, bool) else None,
            _converter(hint),
        )
        for field, hint in get_type_hints(kind).items()
    )


def _converter(hint: Any) -> Callable[[Any], Any] | None:
    if hasattr(hint, "_fields"):
        return functools.partial(result_from_wire, hint)
    arguments = get_args(hint)
    if Ellipsis in arguments:  # tuple[KeyListEntry, ...]
        kind = arguments[0]
        return lambda value: tuple(result_from_wire(kind, entry) for entry in value)
    counters = next((argument for argument in arguments if hasattr(argument, "_fields")), None)  # Counters | None
    return None if counters is None else functools.partial(result_from_wire, counters)
