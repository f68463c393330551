"""What a process has of a batch: all of it, or, as one of several, a part.

Whatever the step of one process and that of several do differently is here, in two pairs of classes with one interface
each: `OneProcess` hands out `WholeBatch`es, `SeveralProcesses` (torchrun) hand out `PartOfBatch`es. Each process's
losses and penalties are means over its own part; weighted by its share of what they are means over, they add up to
those of the whole batch, so that several processes take the step that one would. Every process makes the same calls in
the same order, also one whose part is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from umda_fast.data import BagBatch
from umda_fast.model import TaskSpec
from umda_fast.runtime.fabric import processes_of
from umda_fast.runtime.together import label_counts, penalty_counts
from umda_fast.sgl.distributed import GradientReducer, Processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["OneProcess", "PartOfBatch", "SeveralProcesses", "Share", "WholeBatch", "processes_for"]

Backward = Callable[[Tensor | None], None]


def on_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars read from their device, all at once."""
    if not values:
        return {}
    # `stack` promotes, so that nothing is rounded.
    numbers = torch.stack([value.detach().reshape(()) for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


@dataclass(frozen=True)
class WholeBatch:
    """A batch that one process has all of.

    Attributes:
        instances: of the whole batch.
        counts: None: no other process has to be told what the losses are means over.
    """

    instances: int
    counts: None = None

    def teaches(self, losses: Mapping[str, Tensor]) -> bool:
        """Whether the whole batch has a loss, of which `losses` are this process's."""
        return bool(losses)

    def penalty_weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """`weights` times the share of what each penalty is a mean over."""
        return weights

    def weighted(self, losses: Mapping[str, Tensor]) -> list[Tensor]:
        """What this process's losses are of those of the whole batch."""
        return list(losses.values())

    def read(self, norm: Tensor, losses: Mapping[str, Tensor], penalty: Tensor | None) -> dict[str, float]:
        """`gradient_norm`, `loss/<task>` and `penalty` of the whole batch, in one synchronisation with the device."""
        return on_host(_figures(norm, losses, penalty))

    def read_penalties(self, penalties: Mapping[str, Tensor]) -> dict[str, float]:
        """The penalties of the whole batch, unweighted."""
        return on_host(penalties)

    def read_losses(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Losses of the whole batch, by task, of which `losses` are this process's."""
        return on_host(losses)

    def spoiled_elsewhere(self, own: Sequence[Tensor], lost: bool) -> bool:
        """Whether what is not finite came from another process: `own` is what this one computed; `lost` says that a
        loss or the penalty of the whole batch is not finite."""
        return False


@dataclass(frozen=True)
class PartOfBatch:
    """What one of several processes has of a batch; methods are those of `WholeBatch`.

    Attributes:
        instances: of the whole batch.
        counts: what this process's losses are means over, by task.
        losses: its share of that, by task. penalties: of what each penalty is a mean over.
        present: tasks that some process has, in their order.
    """

    instances: int
    counts: dict[str, float]
    losses: dict[str, float]
    penalties: dict[str, float]
    present: list[str]
    processes: Processes

    def teaches(self, losses: Mapping[str, Tensor]) -> bool:
        return bool(self.present)

    def penalty_weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        return {name: weight * self.penalties[name] for name, weight in weights.items()}

    def weighted(self, losses: Mapping[str, Tensor]) -> list[Tensor]:
        return [loss * self.losses[name] for name, loss in losses.items()]

    def read(self, norm: Tensor, losses: Mapping[str, Tensor], penalty: Tensor | None) -> dict[str, float]:
        zero = torch.zeros((), dtype=torch.float64, device=norm.device)
        parts = [
            losses[name].detach().double() * self.losses[name] if name in losses else zero for name in self.present
        ]
        parts.append(zero if penalty is None else penalty.detach().double().reshape(()))
        parts.append(torch.full_like(zero, penalty is not None))
        *wholes, whole_penalty, penalized = self.processes.total(torch.stack(parts)).unbind()
        whole_losses = dict(zip(self.present, wholes, strict=True))
        values = on_host({**_figures(norm, whole_losses, whole_penalty), "penalized": penalized})
        # A penalty that no process has is 0, and one that is 0 tells nothing.
        if not values.pop("penalized"):
            del values["penalty"]
        return values

    def read_penalties(self, penalties: Mapping[str, Tensor]) -> dict[str, float]:
        return self._whole(penalties, self.penalties)

    def read_losses(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        return self._whole(losses, self.losses)

    def _whole(self, values: Mapping[str, Tensor], shares: Mapping[str, float]) -> dict[str, float]:
        own = on_host(values)
        parts = self.processes.objects({name: own[name] * share for name, share in shares.items() if name in own})
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

    def spoiled_elsewhere(self, own: Sequence[Tensor], lost: bool) -> bool:
        return not own or (lost and all(bool(torch.isfinite(value.detach()).all()) for value in own))


Share = WholeBatch | PartOfBatch


def _figures(norm: Tensor, losses: Mapping[str, Tensor], penalty: Tensor | None) -> dict[str, Tensor]:
    figures = {"gradient_norm": norm, **{f"loss/{name}": loss for name, loss in losses.items()}}
    return figures if penalty is None else {**figures, "penalty": penalty}


class OneProcess:
    """The only process of a run."""

    group = None
    rank = 0

    def share(self, batch: BagBatch) -> WholeBatch:
        """What this process has of the whole batch, `batch` being that; on the host."""
        return WholeBatch(batch.num_instances)

    def align(self, model: nn.Module) -> None:
        """Give every process the weights of process 0."""

    def backward_of(self, parameters: Iterable[nn.Parameter]) -> Backward:
        """A backward pass from this process's part of a loss (None: it has no part of it) to the gradients of the
        whole loss in `.grad` of `parameters`."""

        def backward(total: Tensor | None) -> None:
            if total is not None:
                total.backward()

        return backward

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, by rank, in all of them."""
        return [value]


class SeveralProcesses:
    """One of several processes that train together; methods are those of `OneProcess`."""

    def __init__(self, processes: Processes, tasks: Sequence[TaskSpec], penalties: Iterable[str]) -> None:
        self.group, self.rank = processes.group, processes.rank
        self._processes = processes
        self._tasks = tuple(tasks)
        self._penalties = tuple(penalties)

    def share(self, batch: BagBatch) -> PartOfBatch:
        """One exchange between the processes."""
        names = [task.name for task in self._tasks]
        counts = label_counts(batch, self._tasks)
        means = penalty_counts(batch, self._penalties)
        own = [*(counts.get(name, 0.0) for name in names), *means.values(), float(batch.num_instances)]
        totals = self._processes.total_on_host(own)
        shares = [part / total if total > 0 else 0.0 for part, total in zip(own, totals, strict=True)]
        return PartOfBatch(
            instances=int(totals[-1]),
            counts=counts,
            losses=dict(zip(names, shares, strict=False)),
            penalties=dict(zip(means, shares[len(names) : -1], strict=True)),
            present=[name for name, total in zip(names, totals, strict=False) if total > 0],
            processes=self._processes,
        )

    def align(self, model: nn.Module) -> None:
        for value in model.state_dict().values():
            self._processes.from_first(value)

    def backward_of(self, parameters: Iterable[nn.Parameter]) -> Backward:
        return GradientReducer([list(parameters)], self._processes).backward

    def gather(self, value: Any) -> list[Any]:
        return self._processes.objects(value)


def processes_for(fabric: Fabric, tasks: Sequence[TaskSpec], penalties: Iterable[str]) -> OneProcess | SeveralProcesses:
    """The processes of `fabric`, which train on losses of `tasks` and `penalties` together."""
    processes = processes_of(fabric)
    return OneProcess() if processes is None else SeveralProcesses(processes, tasks, penalties)
