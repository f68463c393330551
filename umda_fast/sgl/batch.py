"""What one backward call works on, and what it used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

NO_FLOAT16 = (
    "it overflows under the loss scale that its gradients need; use float32 (under autocast too: loss.float(), and "
    "backward(..., scaler=)) or bfloat16"
)


@dataclass(frozen=True)
class SGLStep:
    """What one backward call used; tensors on the device, detached.

    Attributes:
        weights: [T] the weight of every task's loss, 0 for an absent task.
        gram: [T, T] Gram matrix of the last statistics step; rows of tasks never seen are 0.
        cosine: [T, T] its cosines.
        norms: [T] square roots of its diagonal.
        active: bool [T], the tasks present.
    """

    weights: Tensor
    gram: Tensor
    cosine: Tensor
    norms: Tensor
    active: Tensor


@dataclass(frozen=True)
class Present:
    """The A tasks present in a batch of T.

    Attributes:
        rows: their positions, in order.
        index: the same, int64 [A] on the device.
        mask: bool [T] on the device.
    """

    rows: tuple[int, ...]
    index: Tensor
    mask: Tensor

    @property
    def everyone(self) -> bool:
        """Whether no task is absent."""
        return len(self.rows) == self.mask.shape[0]

    def take(self, values: Tensor, *dims: int) -> Tensor:
        """The present tasks' part of a [T] or [T, T] tensor, along `dims`."""
        if self.everyone:
            return values
        for dim in dims:
            values = values.index_select(dim, self.index)
        return values

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        """A [T] tensor with `new` [A] in the place of the present tasks' part."""
        return new if self.everyone else values.index_copy(0, self.index, new)


class TaskSets:
    """`Present` of sets of tasks; tensors are made, and copied to the device, once for each set that occurs."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self._device = device
        self._made: dict[tuple[int, ...], Present] = {}

    def __call__(self, rows: tuple[int, ...]) -> Present:
        """Of the tasks at these positions."""
        if rows not in self._made:
            index = torch.tensor(rows, dtype=torch.int64)
            mask = torch.zeros(self._count, dtype=torch.bool)
            mask[index] = True
            self._made[rows] = Present(rows, index.to(self._device), mask.to(self._device))
        return self._made[rows]


@dataclass(frozen=True)
class Batch:
    """The batch of all processes.

    Attributes:
        present: its tasks.
        losses: for each of them this process's part of its loss, None where it has none.
        penalty: this process's part of the penalty.
        penalized: whether some process has a penalty.
        flags: what the scope asks, true where it is in some process.
        scale: of a loss scaler: what backward passes start from is multiplied by it, and so is `.grad` afterwards.
    """

    present: Present
    losses: list[Tensor | None]
    penalty: Tensor | None
    penalized: bool
    flags: Sequence[bool]
    scale: Tensor | None = None

    def scaled(self, value: Tensor) -> Tensor:
        """`value` times the scale, if there is one."""
        return value if self.scale is None else value * self.scale

    def unscale_(self, gradients: Tensor, power: int = 1) -> None:
        """Takes the scale out of gradients, or, with `power` 2, of their products."""
        if self.scale is not None:
            gradients.mul_(self.scale.double().pow(-power).to(gradients.dtype))

    @property
    def own(self) -> list[tuple[int, Tensor]]:
        """(position among the present tasks, loss) of what this process has."""
        return [(position, loss) for position, loss in enumerate(self.losses) if loss is not None]

    def values(self, dtype: torch.dtype) -> Tensor:
        """This process's parts [A] of the losses, detached, zeros where it has none."""
        if len(self.own) == len(self.losses):
            return torch.stack([loss for _, loss in self.own]).detach().to(dtype)
        zero = torch.zeros((), dtype=dtype, device=self.present.mask.device)
        return torch.stack([zero if loss is None else loss.detach().to(dtype) for loss in self.losses])

    def total(self, weights: Tensor) -> Tensor | None:
        """The weighted sum of this process's losses and its penalty, scaled; None where it has neither.

        Args:
            weights: [A].
        """
        own = self.own
        if not own:
            return None if self.penalty is None else self.scaled(self.penalty)
        losses = torch.stack([loss.to(weights.dtype) for _, loss in own])
        if len(own) < len(self.losses):
            weights = torch.stack([weights[position] for position, _ in own])
        total = (losses * weights).sum()
        return self.scaled(total if self.penalty is None else total + self.penalty.reshape(()).to(total.dtype))


class Scaler(Protocol):
    """What is asked of a loss scaler; `torch.amp.GradScaler` has it."""

    def is_enabled(self) -> bool:
        """Whether it scales at all."""

    def scale(self, outputs: Tensor) -> Tensor:
        """`outputs` times the scale."""


def loss_scale(scaler: Scaler | None, device: torch.device) -> Tensor | None:
    """The scale at present, on the device; None where there is none.

    Raises:
        TypeError: not a scaler.
    """
    if scaler is None:
        return None
    if not hasattr(scaler, "is_enabled") or not hasattr(scaler, "scale"):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
    return scaler.scale(torch.ones((), device=device)) if scaler.is_enabled() else None


def check_losses(
    tasks: Sequence[str], losses: Mapping[str, Tensor], counts: Mapping[str, float] | None, penalty: Tensor | None
) -> None:
    """The arguments of a backward call, one by one.

    Raises:
        TypeError: a loss or the penalty is not a Tensor.
        ValueError: an unknown task, a loss that is not a real scalar, is float16 or has no gradient, a count that is
            missing or not positive.
    """
    unknown = [name for name in losses if name not in tasks]
    if unknown:
        raise ValueError(f"losses: expected tasks among {list(tasks)}, got {unknown}")
    scalars: list[tuple[str, Any]] = [(f"losses[{name!r}]", loss) for name, loss in losses.items()]
    if penalty is not None:
        scalars.append(("penalty", penalty))
    for name, value in scalars:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a scalar, got shape {tuple(value.shape)}")
        if not value.is_floating_point():
            raise ValueError(f"{name}: expected a real number, got {value.dtype}")
        if value.dtype == torch.float16:
            raise ValueError(f"{name}: expected anything but float16: {NO_FLOAT16}")
    for name, loss in losses.items():
        if counts is not None and not 0 < counts.get(name, 0) < math.inf:
            raise ValueError(f"counts[{name!r}]: expected a positive number, got {counts.get(name)}")
        if not loss.requires_grad:
            raise ValueError(f"losses[{name!r}]: expected a loss that requires grad, got a constant")
