"""What a scope is: where the gradients of single tasks are taken, and what is done with them.

A scope finds the Gram matrix [T, T] of the task gradients, `measure`, and adds the gradient of the weighted loss to
`.grad`, `apply`. It works on its process's share of a batch; `Setting.exchange` is its way to the others'.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from umda_fast.sgl.batch import Batch
from umda_fast.sgl.buffers import FlatLayout
from umda_fast.sgl.exchange import Exchange
from umda_fast.sgl.graph import Look, Reach
from umda_fast.sgl.parameters import ParameterLists
from umda_fast.sgl.statistics import GramStatistics

Direction = Literal["average", "gradient"]


class Representation(Protocol):
    """What can stand for the representation: it finds the Gram matrix of the gradients on it by itself."""

    @property
    def requires_grad(self) -> bool:
        """Whether there are gradients at all."""

    def gradient_gram(self, losses: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
        """Inner products [S, S] of the gradients of S losses; keeps the graph."""


@dataclass(frozen=True)
class Setting:
    """What every scope works with.

    Attributes:
        tasks: their number T.
        parameters: all of them.
        layout: of the shared ones.
        scoped: those that the scope is about.
        exchange: the way to the other processes.
        statistics: counts of updates, and the decay of averages.
        direction: what the exact scope adds up.
        control: whether it also makes the direction of equal weights.
        backend: of the operations.
    """

    tasks: int
    parameters: ParameterLists
    layout: FlatLayout
    scoped: list[Tensor]
    exchange: Exchange
    statistics: GramStatistics
    direction: Direction
    control: bool
    backend: str | None


@dataclass(frozen=True)
class Measured:
    """What a statistics step found, of all processes.

    Attributes:
        gram: [T, T]; None where no gradients are taken.
        losses: [A] of the tasks present, detached.
        sound: bool [T], the tasks present whose loss and gradient are finite. Only these enter averages.
        broken: bool [T], in the exact scope, the tasks whose gradient is not.
        unshared: in the exact scope, gradients of all other leaves in this process: (leaf, position of the task among
            those present, gradient), -1 for the penalty.
    """

    gram: Tensor | None
    losses: Tensor
    sound: Tensor
    broken: Tensor | None = None
    unshared: Sequence[tuple[Tensor, int, Tensor]] = ()


def reentrant(place: str) -> str:
    """What to say of a re-entrant checkpoint."""
    return (
        f"losses: a re-entrant checkpoint lies {place}, through which PyTorch takes no gradient of a single task; use "
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or a scope above it"
    )


class GradientScope(ABC):
    """A scope, set up for a model.

    Attributes:
        needs_layer: whether `last_shared_layer` has to be given.
        tells_added: whether `added` knows what is added to the `.grad` of the shared parameters.
        reached: for each parameter of the scope, whether a task has reached it so far.
        control: [P] in the exact scope on demand: what equal weights would have added to `.grad` minus what was.
    """

    needs_layer: ClassVar[bool] = False
    tells_added: ClassVar[bool] = False
    control: Tensor | None = None

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.reached = [False] * len(setting.scoped)

    @classmethod
    def parameters(cls, lists: ParameterLists) -> list[Tensor]:
        """Those that the scope is about."""
        return lists.shared

    @classmethod
    def missing(cls, representation: Tensor | Representation | None) -> str:
        """What a backward call with these arguments lacks, in words; nothing by default."""
        return ""

    def look(self, losses: Mapping[int, Tensor], penalty: Tensor | None) -> Look:
        """Looks at this process's losses, by task, before a statistics step.

        Raises:
            ValueError: their task gradients cannot be taken.
        """
        if not self._setting.exchange.several or self._setting.parameters.sharded:
            return Look()
        return Look(tasks=Reach(losses.values() if penalty is None else [*losses.values(), penalty]))

    @abstractmethod
    def measure(self, batch: Batch, look: Look, representation: Tensor | Representation | None) -> Measured:
        """Takes the gradients of the tasks present; keeps the graph unless `apply` needs none.

        Raises:
            ValueError: no gradient comes to the scope.
        """

    def apply(self, measured: Measured, batch: Batch, weights: Tensor, everyone: Tensor) -> None:
        """Adds the gradient of the weighted total loss to every `.grad`: by ONE backward pass.

        Args:
            measured: what `measure` found.
            batch: the same.
            weights: [A] of the tasks present.
            everyone: the same, [T] with 0 for the others.
        """
        self._setting.exchange.backward(batch.total(weights))

    def added(self) -> Tensor | None:
        """[P] what `apply` added to the `.grad` of the shared parameters, but for what hooks did to it; once."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Running averages, by name, as they lie in this process."""
        return {}

    def state(self, *, keep: bool) -> dict[str, Tensor]:
        """Running averages in full size. Every process calls it; `keep=False` for nothing."""
        return self.tensors()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of `state`."""
        return {name: tuple(value.shape) for name, value in self.tensors().items()}

    def restore(self, reached: Sequence[bool]) -> None:
        """Puts `reached` back."""
        self.reached = list(reached)

    def load(self, name: str, value: Tensor) -> None:
        """Puts one of `state` back."""
        self.tensors()[name].copy_(value)


class Unmeasured(GradientScope):
    """No task gradients at all, for a balancer that reads losses only."""

    def measure(self, batch: Batch, look: Look, representation: Tensor | Representation | None) -> Measured:
        """The losses."""
        setting = self._setting
        (losses,) = setting.exchange.totals(batch.values(setting.layout.dtype))
        return Measured(None, losses, setting.statistics.judge(losses, None, batch.present))
