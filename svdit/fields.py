"""Frozen dataclasses that files contain: declared types are checked, and JSON becomes an instance or one sentence."""

from collections.abc import Mapping
from dataclasses import fields
from math import isfinite
from typing import Any, TypeVar, get_args, get_origin

from svdit.errors import UserError

Options = TypeVar("Options")


def check_types(options: Any) -> None:
    """Raises UserError for a field of another type than declared, such as a bool for an int, and for NaN or Inf.

    An int may stand for a float. The values of `Literal` types must be among those named; tuples contain floats.
    """
    for field in fields(options):
        value, choices = getattr(options, field.name), get_args(field.type)
        if get_origin(field.type) is tuple:
            if type(value) is not tuple or not all(type(each) is float and isfinite(each) for each in value):
                raise UserError(f"{field.name} is {value!r}; pass a tuple of finite floats")
            continue
        if choices and not any(isinstance(choice, type) for choice in choices):
            if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
                raise UserError(f"{field.name} is {value!r}; choose one of {', '.join(map(str, choices))}")
            continue
        types = set(choices or [field.type])
        if type(value) not in types | ({int} if float in types else set()):
            raise UserError(f"{field.name} is {value!r}, a {type(value).__name__}; pass a value of type {names(types)}")
        if float in types and value is not None and not -1e300 < value < 1e300:
            raise UserError(f"{field.name} is {value!r}; pass a finite number")


def names(types: set[Any]) -> str:
    """The names of types as a choice in words."""
    return " or ".join(sorted("None" if kind is type(None) else kind.__name__ for kind in types))


def from_json(kind: type[Options], values: object) -> Options:
    """A dataclass from the fields in a file; absent ones get their defaults, and lists become tuples.

    Raises UserError for anything that is no mapping, for unknown fields, and for what the dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{kind.__name__} is {values!r}, not a set of fields; pass an unchanged file")
    if unknown := [key for key in values if key not in {field.name for field in fields(kind)}]:  # type: ignore[arg-type]
        raise UserError(f"{kind.__name__} has no field {unknown[0]!r}; pass an unchanged file, or upgrade svdit")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
