"""Fields of specs and configurations, checked one by one. Errors name the field, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["as_float", "as_tuple", "check_int", "check_name"]


def check_name(owner: str, name: object) -> None:
    """Raise unless `name` is a string that may name a view, a task or a number."""
    if not isinstance(name, str):
        raise TypeError(f"{owner}.name: expected a string, got {type(name).__name__}")
    if not name or name != name.strip():
        raise ValueError(f"{owner}.name: expected a non-empty string without surrounding blanks, got {name!r}")


def check_int(argument: str, value: object) -> int:
    """`value`, if it is an int and no bool."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an int, got {value!r} ({type(value).__name__})")
    return value


def as_float(argument: str, value: object) -> float:
    """`value` as a float, if it is a finite number and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: expected a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {value!r}")
    return float(value)


def as_tuple(argument: str, value: object) -> tuple[object, ...]:
    """`value` as a tuple, if it is a sequence and no string."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{argument}: expected a sequence, got {value!r} ({type(value).__name__})")
    return tuple(value)
