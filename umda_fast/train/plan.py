"""How long a training is and how large its batches are: as it is said, or chosen from the number of bags.

What an epoch is depends on the bags: a number of epochs that is right for one set is far too few updates for another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from umda_fast.data import InstanceBudgetSampler
from umda_fast.data.arrays import IntArray

if TYPE_CHECKING:
    from umda_fast.runtime.config import DataConfig, TrainConfig

__all__ = ["FEW_UPDATES", "Plan", "batch_bags", "default_updates", "make_plan"]

# Below this a training is warned about: it may end before it has learnt.
FEW_UPDATES = 200


def default_updates(bags: int) -> int:
    """Updates for so many training bags: `400 (bags / 150)^(1/3)`, within 400 and 1200, in tens.

    A choice, not a law: 400 for 150 bags and about 1000 for 2500, with the root between them (docs/training.md).
    """
    return round(min(max(400.0 * math.cbrt(bags / 150.0), 400.0), 1200.0) / 10.0) * 10


def batch_bags(bags: int) -> int:
    """Bags in a batch for so many training bags: a tenth, within 16 and 64."""
    return min(max(round(bags / 10), 16), 64)


@dataclass(frozen=True)
class Plan:
    """When a training ends, at whatever comes first.

    Attributes:
        bags: in a batch at most; None: as many as the budget of instances holds.
        budget: of instances in a batch.
        epochs, steps: passes over the bags, and updates; None sets no end, but one of them does.
        updates: that this comes to; batches differ a little from epoch to epoch.
        per_epoch: updates in an epoch, likewise.
        why: what decided on the length.
    """

    bags: int | None
    budget: int
    epochs: int | None
    steps: int | None
    updates: int
    per_epoch: int
    why: str

    def progress(self, epoch: float, step: int) -> float:
        """Share of the training that is done after so many epochs (1.5: half of the second) and updates, 0..1."""
        shares = [epoch / self.epochs] if self.epochs is not None else []
        shares += [step / self.steps] if self.steps is not None else []
        return min(max(shares), 1.0)

    def done(self, epoch: int, step: int) -> bool:
        """Whether the training has ended after so many whole epochs or so many updates."""
        return (self.epochs is not None and epoch >= self.epochs) or (self.steps is not None and step >= self.steps)

    def place(self, epoch: int, step: int) -> str:
        """Where a training stands, in words."""
        if self.epochs is None:
            return f"update {step}/{self.steps}"
        return f"epoch {epoch + 1}/{self.epochs}"

    def describe(self) -> str:
        """For the start of a training."""
        most = f"{self.budget:,} instances"
        batch = most if self.bags is None else f"{self.bags} bags (at most {most})"
        epochs = self.updates / self.per_epoch
        return f"{self.updates:,} updates, {epochs:,.3g} epochs, in batches of {batch}: {self.why}"

    def warning(self) -> str | None:
        """What is likely to be wrong with it."""
        if self.updates >= FEW_UPDATES:
            return None
        return (
            f"{self.updates} updates are few: expected at least {FEW_UPDATES} "
            "(raise train.steps or train.epochs, or lower data.bags)"
        )


def make_plan(train: TrainConfig, data: DataConfig, sizes: IntArray) -> Plan:
    """The plan for training bags of `sizes` instances, int64 [B], B > 0.

    What is said counts: `train.epochs`, `train.steps`, whichever ends first, and `data.bags`. With neither, the number
    of epochs is the one that comes to `default_updates`, and 5 at least, so that every bag is seen a few times.
    """
    count = len(sizes)
    bags = batch_bags(count) if data.bags == "auto" else data.bags
    sampler = InstanceBudgetSampler(np.asarray(sizes), data.budget, shuffle=False, max_bags=bags)
    per_epoch = sampler.num_batches(0)
    epochs, steps = train.epochs, train.steps
    if epochs is None and steps is None:
        wanted = default_updates(count)
        epochs = max(math.ceil(wanted / per_epoch), 5)
        why = f"{count:,} training bags ask for {wanted:,}"
    else:
        said = {"train.epochs": epochs, "train.steps": steps}
        why = " and ".join(f"{name} = {value}" for name, value in said.items() if value is not None)
    ends = [epochs * per_epoch] if epochs is not None else []
    ends += [steps] if steps is not None else []
    return Plan(bags, data.budget, epochs, steps, min(ends), per_epoch, why)
