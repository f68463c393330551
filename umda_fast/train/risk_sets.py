"""Losses of tasks whose bags are compared with each other (`TaskKind.joint`), as Cox's partial likelihood is.

Such a loss is not a sum over bags, and a small batch has little to compare. So it is found over all bags of the batch,
whichever process has them, and, in a batch of fewer than `FEWEST` labelled bags, over those of the batches before as
well, with the logits that they had then. Let l be the sum of the losses over all these N bags, n the labelled ones of
the batch, and m the mean of their logits, which l leaves open. The gradient that is trained by is that of

    l / n + ANCHOR / 2 m^2

with respect to the logits of the batch, so that every bag has the residual that it would have among so many: of Cox's,
its event less what was expected of it by then. The value that is shown is the mean of the losses over all, l / N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from umda_fast.data import BagBatch
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec
from umda_fast.tasks import kind_of
from umda_fast.train.share import OneProcess, SeveralProcesses

__all__ = ["ANCHOR", "FEWEST", "RiskSets"]

FEWEST = 64
ANCHOR = 0.1


@dataclass(frozen=True)
class _Rows:
    """Labelled bags: logits [n, outputs], labels [n, *label_shape], and what every view alone says, [n, V, outputs],
    with whether it is there, [n, V]; V is 0 without heads of views."""

    logits: Tensor
    labels: Tensor
    alone: Tensor
    present: Tensor

    def __len__(self) -> int:
        return len(self.logits)

    def detached(self) -> _Rows:
        return _Rows(**{name: value.detach() for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> _Rows:
        return _Rows(**{name: value.to(device) for name, value in vars(self).items()})

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


class RiskSets:
    """Remembers bags of the batches before, the same in every process.

    Args:
        tasks: of the model; those that are not joint are left out.
        processes: that train together; every one calls `losses` for every batch.
    """

    def __init__(self, tasks: Sequence[TaskSpec], processes: OneProcess | SeveralProcesses) -> None:
        self.tasks = tuple(task for task in tasks if kind_of(task).joint(task))
        self._processes = processes
        self._recent: dict[str, list[_Rows]] = {task.name: [] for task in self.tasks}

    def losses(self, host: BagBatch, batch: BagBatch, out: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of every task with a label in this process's part of a batch, and what every view alone loses, {}
        without heads of views. Weighted by what part of the labels it is, they add up to those of the whole batch.

        Args:
            host, batch: this process's part, in host memory and on the device.
            out: of the model; None where the part is empty.
        """
        if not self.tasks:
            return {}, {}
        own = {} if out is None else {task.name: self._rows(task, host, batch, out) for task in self.tasks}
        alone_there = isinstance(self._processes, OneProcess)
        sent = own if alone_there else {name: rows.detached().to("cpu") for name, rows in own.items()}
        parts = self._processes.gather(sent)
        parts[self._processes.rank] = own  # that of which there is a gradient
        losses: dict[str, Tensor] = {}
        alone: dict[str, Tensor] = {}
        for task in self.tasks:
            found = [part[task.name] for part in parts if len(part.get(task.name, ()))]
            if not found:
                continue
            mine = own.get(task.name)
            whole = _Rows.joined([rows.to(batch.ptr.device) for rows in found])
            if mine is not None and len(mine):
                losses[task.name], of_views = self._compare(task, len(mine), whole)
                alone |= {} if of_views is None else {task.name: of_views}
            self._remember(task.name, whole.detached())
        return losses, alone

    def _rows(self, task: TaskSpec, host: BagBatch, batch: BagBatch, out: Any) -> _Rows:
        logits, labels = _wide(out.logits[task.name]), batch.labels[task.name]
        views = getattr(out, "view_logits", None)
        alone = logits.new_zeros(len(logits), 0, task.outputs) if views is None else _wide(views[task.name])
        present = torch.ones_like(alone[..., 0], dtype=torch.bool) if views is None else out.view_present
        rows = host.label_mask[task.name].nonzero()[:, 0].to(logits.device)
        return _Rows(logits[rows], labels[rows], alone[rows], present[rows])

    def _compare(self, task: TaskSpec, own: int, whole: _Rows) -> tuple[Tensor, Tensor | None]:
        """The loss, and that of the views, of a process that has `own` of the bags of the batch."""
        kind, bags, share = kind_of(task), len(whole), own / len(whole)
        location = kind.location(task, whole.logits)
        recent = self._recent_with(task.name, bags)
        rows = _Rows.joined([whole, *(part.to(whole.logits.device) for part in recent)])
        total = kind.bag_losses(task, rows.logits, rows.labels, None)[0].sum()
        trained = total / bags + (0.0 if location is None else 0.5 * ANCHOR * location.square())
        loss = _as(total / len(rows), trained / share)
        views = rows.alone.shape[1]
        if not views:
            return loss, None
        each = [
            kind.bag_losses(task, rows.alone[:, view], rows.labels, rows.present[:, view])[0].sum() / views
            for view in range(views)
        ]
        total = torch.stack(each).sum()
        return loss, _as(total / len(rows), total / bags / share)

    def _recent_with(self, name: str, bags: int) -> list[_Rows]:
        """The last batches that make up `FEWEST` with `bags` more, as far as there are so many: whole ones, for the
        order of the bags in one depends on how they were dealt out."""
        found: list[_Rows] = []
        for rows in reversed(self._recent[name]):
            if bags >= FEWEST:
                break
            found.append(rows)
            bags += len(rows)
        return found

    def _remember(self, name: str, rows: _Rows) -> None:
        self._recent[name].append(rows)
        self._recent[name] = self._recent_with(name, 0)[::-1]

    def state_dict(self) -> dict[str, list[dict[str, Tensor]]]:
        """What is remembered, on the CPU; {} without a joint task."""
        return {
            name: [dict(vars(rows.to("cpu"))) for rows in recent] for name, recent in self._recent.items()
        }

    def load_state_dict(self, state: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            DataError: it is of other tasks.
        """
        if set(state) != set(self._recent):
            raise DataError(f"recent bags: expected of {sorted(self._recent)}, got of {sorted(state)}")
        self._recent = {name: [_Rows(**rows) for rows in recent] for name, recent in state.items()}


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _as(value: Tensor, gradient: Tensor) -> Tensor:
    """A scalar with this value and the gradient of the other."""
    return value.detach() + (gradient - gradient.detach())
