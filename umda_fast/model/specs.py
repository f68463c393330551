"""What a model is told about its views and tasks: names, widths, kinds. Plain data, JSON-able."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from umda_fast.tasks import TASK_KINDS, TaskKind, TaskSpec
from umda_fast.tasks.checks import as_float, check_int, check_name

__all__ = ["TASK_KINDS", "MetadataSpec", "TaskKind", "TaskSpec", "ViewSpec", "check_distinct"]


@dataclass(frozen=True)
class ViewSpec:
    """One view: its name and the width of its features, `[n, width]`.

    Images and other shaped inputs are given flattened; an encoder of one's own unflattens them first.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    name: str
    width: int

    def __post_init__(self) -> None:
        check_name("ViewSpec", self.name)
        if check_int(f"ViewSpec({self.name!r}).width", self.width) < 1:
            raise ValueError(f"ViewSpec({self.name!r}).width: expected at least 1, got {self.width}")


@dataclass(frozen=True)
class MetadataSpec:
    """One number that is known of a bag beside its instances (an age, a magnification).

    Attributes:
        name: unique among a model's metadata.
        mean, std: of the training bags; models see `(value - mean) / std`.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_name("MetadataSpec", self.name)
        where = f"MetadataSpec({self.name!r})"
        object.__setattr__(self, "mean", as_float(f"{where}.mean", self.mean))
        object.__setattr__(self, "std", as_float(f"{where}.std", self.std))
        if self.std <= 0.0:
            raise ValueError(f"{where}.std: expected a positive number, got {self.std}")


def check_distinct(argument: str, specs: Iterable[ViewSpec | TaskSpec | MetadataSpec]) -> None:
    """Raise ValueError naming `argument` if two specs share a name."""
    names = [spec.name for spec in specs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{argument}: expected distinct names, got {', '.join(repeated)} more than once")
