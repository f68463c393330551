"""Fields of a `TaskSpec` that belong to tasks with times, checked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from umda_fast.tasks.checks import as_float, as_tuple, check_int

__all__ = ["OF_TIME", "checked_timed_fields"]

OF_TIME = ("cuts", "hazards", "intervals", "times", "columns", "loss", "baseline")


def checked_timed_fields(where: str, classes: int, losses: Sequence[str], fields: dict[str, Any]) -> dict[str, Any]:
    """Those of `fields`, which are all of `OF_TIME`, that are not None, sequences as tuples.

    Args:
        classes: as of the spec. losses: that its kind has, the usual one first.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """
    found = {name: value for name, value in fields.items() if value is not None}
    for name in ("cuts", "hazards", "times", "baseline"):
        if name in found:
            argument = f"{where}.{name}"
            found[name] = tuple(as_float(argument, value) for value in as_tuple(argument, found[name]))
    for name in ("cuts", "times"):
        numbers = found.get(name, (1.0,))
        if not numbers or any(before >= value for before, value in pairwise((0.0, *numbers))):
            raise ValueError(f"{where}.{name}: expected rising numbers above 0, got {numbers!r}")
    if "hazards" in found:
        numbers = found["hazards"]
        if len(numbers) != classes or not all(0.0 < value < 1.0 for value in numbers):
            raise ValueError(f"{where}.hazards: expected {classes} numbers between 0 and 1, got {numbers!r}")
    if len(found.get("cuts", range(classes))) != classes:
        raise ValueError(f"{where}.cuts: expected {classes}, one for each interval, got {len(found['cuts'])}")
    if "intervals" in found and check_int(f"{where}.intervals", found["intervals"]) < 1:
        raise ValueError(f"{where}.intervals: expected at least 1, got {found['intervals']}")
    if "columns" in found:
        columns = found["columns"] = as_tuple(f"{where}.columns", found["columns"])
        if len(set(columns)) != 2 or len(columns) != 2 or not all(isinstance(name, str) for name in columns):
            raise ValueError(f"{where}.columns: expected the column of times and that of events, got {columns!r}")
    if found.get("loss", losses[0]) not in losses:
        raise ValueError(f"{where}.loss: expected {' or '.join(losses)}, got {found['loss']!r}")
    if "baseline" in found:
        numbers = found["baseline"]
        if found.get("loss") != "cox":
            raise ValueError(f"{where}.baseline: belongs to the loss cox, got it for {found.get('loss', losses[0])}")
        if len(numbers) != classes or any(before > value for before, value in pairwise((0.0, *numbers))):
            expected = f"{classes} numbers of at least 0, none less than the one before"
            raise ValueError(f"{where}.baseline: expected {expected}, got {numbers!r}")
    return found
