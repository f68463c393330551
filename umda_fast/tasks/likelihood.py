"""What the numbers of a survival head mean: a likelihood, which `TaskSpec.loss` names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from umda_fast.tasks.kind import Array, FloatArray, TaskSpec

__all__ = ["Likelihood", "cuts_of"]


class Likelihood(ABC):
    """Methods are those of `TaskKind` of the same names; B bags, K cuts. An object has no state."""

    joint: ClassVar[bool]
    """As `TaskKind.joint`."""

    @abstractmethod
    def outputs(self, task: TaskSpec) -> int:
        """Width of the head."""

    @abstractmethod
    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        """[B], of times and events [B, 2]; a bag whose time is negative has no label."""

    @abstractmethod
    def undecided_loss(self, task: TaskSpec, logits: Tensor) -> Tensor:
        """A scalar."""

    @abstractmethod
    def log_survival(self, task: TaskSpec, logits: Tensor) -> Tensor:
        """Logarithm of the probability to live longer than each cut, [B, K]."""

    @abstractmethod
    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        """[B, outputs], at the cuts of the first."""

    @abstractmethod
    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        """[B, outputs]."""

    @abstractmethod
    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """[outputs]."""


def cuts_of(task: TaskSpec, like: Tensor) -> Tensor:
    """The ends of the intervals, [K], in the dtype and on the device of `like`."""
    if task.cuts is None:
        raise ValueError(f"task {task.name!r}: expected cuts, which `fit` chooses from labels, got none")
    return like.new_tensor(task.cuts)
