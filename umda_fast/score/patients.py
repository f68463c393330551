"""Predictions of patients out of those of their bags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from umda_fast.data.arrays import IntArray
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec
from umda_fast.score.collect import Predictions
from umda_fast.tasks import kind_of

__all__ = ["Patients", "join_predictions", "mean_of_bags"]


@dataclass(frozen=True)
class Patients:
    """Whose bags some are.

    Attributes:
        names: of the patients, in the order of their first bags; the bag's own name where nobody knows whose it is.
        members: rows of the bags of each.
    """

    names: list[str]
    members: list[IntArray]

    @classmethod
    def of(cls, where: str, names: Sequence[str], groups: Sequence[str] | None) -> Patients:
        """Those of the bags of these `names`, by their groups as `BagDataset.groups` has them.

        Raises:
            DataError: nothing says whose the bags are, or a bag of nobody has the name of a patient.
        """
        if groups is None:
            raise DataError(
                f"{where}: by patient: expected data that says whose the bags are, got none; name the column of "
                "patients with --set data.options.patient=COLUMN"
            )
        rows: dict[str, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(group, []).append(row)
        shown = [
            names[own[0]] if group.startswith("slide ") else group.removeprefix("patient ")
            for group, own in rows.items()
        ]
        seen: set[str] = set()
        for name in shown:
            if name in seen:
                raise DataError(f"{where}: bag {name!r} has no patient and is named like one; say whose it is")
            seen.add(name)
        return cls(shown, [np.array(own, dtype=np.int64) for own in rows.values()])


def mean_of_bags(task: TaskSpec, logits: Tensor, patients: Patients, sizes: Sequence[int]) -> Tensor:
    """Logits whose prediction is the mean of those of a patient's bags, [P, outputs] in float64.

    Of probabilities (binary, multiclass, multilabel, ordinal) the mean of each, of a regression the mean value, of
    survival the mean of the curves: what `TaskKind.mean_logits` says, as for several models. Bags without instances say
    nothing and have no part in it, unless the patient has no other.

    Args:
        logits: [B, outputs], of the bags.
        sizes: instances of the bags.
    """
    full = np.asarray(sizes) > 0
    parts = []
    for members in patients.members:
        rows = members[full[members]] if full[members].any() else members
        own = [logits[row : row + 1].double() for row in rows.tolist()]
        parts.append(own[0] if len(own) == 1 else kind_of(task).mean_logits([task] * len(own), own))
    return torch.cat(parts) if parts else logits.double()


def join_predictions(
    where: str, tasks: Sequence[TaskSpec], found: Predictions, patients: Patients, sizes: Sequence[int]
) -> Predictions:
    """Predictions and labels of patients, whose bags `found` is of.

    Raises:
        DataError: bags of one patient have different labels of a task, naming both.
    """
    logits, labels, masks = {}, {}, {}
    for task in tasks:
        logits[task.name] = mean_of_bags(task, found.logits[task.name], patients, sizes).float()
        column, mask = found.labels[task.name], found.masks[task.name]
        firsts, there = [], []
        for name, members in zip(patients.names, patients.members, strict=True):
            known = [row for row in members.tolist() if mask[row]]
            if known and not bool((column[known] == column[known[0]]).all()):
                raise DataError(
                    f"{where}: task {task.name!r}: expected one label for all bags of patient {name!r}, to measure by "
                    "patient, got several; measure by bag"
                )
            firsts.append(column[known[0]] if known else torch.zeros_like(column[0]))
            there.append(bool(known))
        labels[task.name], masks[task.name] = torch.stack(firsts), torch.tensor(there)
    return Predictions(logits, labels, masks)
