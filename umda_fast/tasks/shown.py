"""Figures that a kind of task wants shown, as plain data; who draws them is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

__all__ = ["Confusion", "Rows", "Scatter", "Shown"]


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


Shown: TypeAlias = Confusion | Scatter | Rows
