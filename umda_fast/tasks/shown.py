"""Figures that a kind of task wants shown, as plain data; who draws them is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

__all__ = ["Confusion", "Followed", "Rows", "Scatter", "Shown"]


@dataclass(frozen=True)
class Confusion:
    """Predicted class against label, int64 [B] each, and the classes' names."""

    predicted: Tensor
    target: Tensor
    names: Sequence[str]


@dataclass(frozen=True)
class Scatter:
    """Predicted value against label, [B] each, in the label's units."""

    predicted: Tensor
    target: Tensor


@dataclass(frozen=True)
class Rows:
    """A table."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Followed:
    """Groups of bags followed over time: times and events (1, or 0 for censored) [B] and group, int64 [B], with the
    groups' names, lowest risk first; and a table."""

    time: Tensor
    event: Tensor
    group: Tensor
    names: Sequence[str]
    table: Rows


Shown: TypeAlias = Confusion | Scatter | Rows | Followed
