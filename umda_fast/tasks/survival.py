"""The time to an event that not all bags have had when they were last seen.

What the head's numbers mean is one of two likelihoods: hazards of intervals of time (`umda_fast.tasks.hazards`) or, on
request, the partial likelihood of Cox (`umda_fast.tasks.cox`). Predicted is in both the probability to live longer than
some times, the cuts of the task, at quantiles of the training bags' event times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.errors import DataError
from umda_fast.tasks.columns import as_texts, expect_numbers, parse_number
from umda_fast.tasks.cox import Cox, breslow
from umda_fast.tasks.few_units import auroc_interval
from umda_fast.tasks.hazards import Hazards
from umda_fast.tasks.intervals import choose_cuts, marginal_hazards, survival_at
from umda_fast.tasks.kind import Array, ClassWeights, FloatArray, TaskKind, TaskSpec
from umda_fast.tasks.likelihood import Likelihood, cuts_of
from umda_fast.tasks.shown import Followed, Rows, Shown
from umda_fast.tasks.survival_scores import harrell, integrated_brier, kaplan_meier, mean_auc, uno

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Survival"]

_USUAL = "hazards"
_LIKELIHOODS: dict[str, Likelihood] = {_USUAL: Hazards(), "cox": Cox()}
_EVENT = frozenset({"1", "true", "yes", "dead", "deceased", "died", "death", "event"})
_CENSORED = frozenset({"0", "false", "no", "alive", "living", "censored"})


class Survival(TaskKind):
    """A label is a time and whether the event came then (1) or the bag was last seen (0): [2]. The prediction is the
    probability to live longer than each cut, [B, K]."""

    name = "survival"
    primary = "c_index"
    loss_name = "negative log likelihood (nats)"
    any_classes = True
    several = True
    timed = True
    decides = False
    calibration = "temperature"
    scarce = "events"
    no_label = -1.0
    named_losses = tuple(_LIKELIHOODS)

    def likelihood(self, task: TaskSpec) -> Likelihood:
        """What the head's numbers mean."""
        return _LIKELIHOODS[task.loss or _USUAL]

    def outputs(self, task: TaskSpec) -> int:
        return self.likelihood(task).outputs(task)

    def label_shape(self, task: TaskSpec) -> tuple[int, ...]:
        return (2,)

    def joint(self, task: TaskSpec) -> bool:
        return self.likelihood(task).joint

    def location(self, task: TaskSpec, logits: Tensor) -> Tensor | None:
        return logits.mean() if self.joint(task) else None

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        return self.likelihood(task).losses(task, logits, target)

    def undecided_loss(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return self.likelihood(task).undecided_loss(task, logits)

    def decode(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return self.likelihood(task).log_survival(task, logits).exp()

    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        return self.likelihood(tasks[0]).mean_logits(tasks, logits)

    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        return self.likelihood(task).linear_targets(task, target)

    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        return self.likelihood(task).constant(task, column)

    def complete_trained(self, task: TaskSpec, logits: Tensor, target: Tensor) -> TaskSpec:
        """With the baseline hazard of a loss that leaves it open."""
        if not self.joint(task) or not len(target):
            return task
        ends = cuts_of(task, target)  # in the precision of the times, some of which they are
        log_risk, time, event, at = (
            part.double().cpu().numpy() for part in (logits[:, 0], target[:, 0], target[:, 1], ends)
        )
        return replace(task, baseline=tuple(breslow(log_risk, time, event, at).tolist()))

    # ---- labels

    def read(self, where: str, name: str, array: Array) -> tuple[TaskSpec, FloatArray]:
        task = TaskSpec(name, self.name)
        column = self.read_as(where, task, array)
        return self.complete(task, column), column

    def read_as(self, where: str, task: TaskSpec, array: Array) -> FloatArray:
        if array.shape[1] != 2:
            raise DataError(f"{where}: expected times and events, [B, 2], got {list(array.shape)}")
        times = expect_numbers(f"{where}: times", array[:, 0], self.name)
        wrong = np.flatnonzero(times < 0)
        if len(wrong):
            raise DataError(f"{where}: times: expected at least 0, got {times[wrong[0]]:g} in row {wrong[0]}")
        column = np.stack([times, np.array([_event(where, text) for text in as_texts(array[:, 1])])], axis=1)
        column[np.isnan(column).any(axis=1)] = np.nan
        return column

    def check_label(self, where: str, task: TaskSpec, label: Tensor) -> None:
        if label.shape != (2,):
            raise DataError(f"{where}: expected a time and an event, [2], got shape {list(label.shape)}")
        time, event = label.tolist()
        if not (math.isfinite(time) and time >= 0 and event in (0, 1)):
            raise DataError(f"{where}: expected a time of at least 0 and an event of 0 or 1, got {time:g}, {event:g}")

    def complete(self, task: TaskSpec, column: FloatArray) -> TaskSpec:
        """With cuts; hazards, where someone said cuts, are those of the training bags alone."""
        return task if task.cuts is not None else self.fit(task, column)

    def fit(self, task: TaskSpec, column: FloatArray, class_weights: ClassWeights = None) -> TaskSpec:
        """Cuts, unless someone said them (there are no hazards yet), and the hazards of all together."""
        cuts = task.cuts if task.cuts is not None and task.hazards is None else choose_cuts(column, task.intervals)
        return replace(task, classes=len(cuts), cuts=cuts, hazards=marginal_hazards(cuts, column), baseline=None)

    def chance(self, task: TaskSpec, column: FloatArray) -> float:
        """That of any constant."""
        return 0.5

    def outcomes(self, task: TaskSpec, column: FloatArray) -> list[int]:
        """Censored bags, which say little."""
        return [int((column[:, 1] == 0).sum())]

    def strata(self, task: TaskSpec, column: FloatArray) -> list[npt.NDArray[np.bool_]]:
        """Early and late events, and early and late censorings, each halved at its median."""
        found = []
        for event in (1, 0):
            there = column[:, 1] == event
            if there.any():
                early = column[:, 0] <= np.median(column[there, 0])
                found += [there & early, there & ~early]
        return found

    def summary(self, column: FloatArray) -> dict[str, float]:
        known = column[~np.isnan(column).any(axis=1)]
        if not len(known):
            return {}
        times, events = known[:, 0], int(known[:, 1].sum())
        figures = {"events": events, "censored": len(known) - events, "min": times.min(), "max": times.max()}
        return {name: float(figure) for name, figure in figures.items()}

    def problem(self, task: TaskSpec, column: FloatArray, everywhere: FloatArray) -> str | None:
        found = self.summary(column)
        return None if found["events"] else f"no event in {found['censored']:g} labelled bags"

    # ---- scores

    def risk(self, prediction: Tensor) -> Tensor:
        """The mean over the cuts of the probability that the event has come by then, [B] in 0..1."""
        return 1.0 - prediction.mean(1)

    def metrics(self, task: TaskSpec) -> dict[str, Metric]:
        from umda_fast.tasks.survival_metrics import AtTimes, Concordance

        times = _scored_times(task)
        return {
            "c_index": Concordance(harrell),
            "c_index_uno": Concordance(uno),
            "auc_td": AtTimes(mean_auc, times),
            "ibs": AtTimes(integrated_brier, times),
        }

    def for_metric(self, task: TaskSpec, metric: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if metric.startswith("c_index"):
            return self.risk(prediction.double())[:, None], target
        return torch.stack([prediction, cuts_of(task, prediction).expand_as(prediction)], 1), target

    def defined(self, task: TaskSpec, metric: str, target: Tensor) -> Tensor | None:
        """Not without an event before the last time."""
        time, event = target.unbind(1)
        return ((event == 1) & (time < time.max())).any()

    def primary_score(self, task: TaskSpec, prediction: Array, target: Array) -> float:
        return harrell(1.0 - prediction.mean(axis=1), target[:, 0], target[:, 1])

    def scores(self, task: TaskSpec, prediction: Array, target: Array) -> dict[str, float]:
        time, event = target.T
        if not ((event == 1) & (time < time.max())).any():
            return dict.fromkeys(("c_index", "c_index_uno", "auc_td", "ibs"), float("nan"))
        risk, times = 1.0 - prediction.mean(axis=1), _scored_times(task)
        known = prediction[:, : len(times)]  # they are the first cuts
        found = {"c_index": harrell(risk, time, event), "c_index_uno": uno(risk, time, event)}
        found["auc_td"] = mean_auc(known, time, event, np.array(times))
        return found | {"ibs": integrated_brier(known, time, event, np.array(times))}

    def few_units(self, task: TaskSpec, score: float, target: Array, level: float) -> tuple[float, float] | None:
        """As of an AUROC of the bags with the event against half of the others, as many as live longer on average."""
        events, others = int(target[:, 1].sum()), (len(target) - 1) // 2
        return auroc_interval(score, others, events, level) if events and others and score == score else None

    def few_units_of(
        self, task: TaskSpec, metric: str, score: float, target: Array, level: float
    ) -> tuple[float, float] | None:
        """The others that are shares of pairs as `c_index`."""
        return None if metric == "ibs" else self.few_units(task, score, target, level)

    # ---- shown

    def shown_times(self, task: TaskSpec) -> tuple[float, ...]:
        """Those that were asked for, or else the quartiles of the cuts."""
        if task.times is not None:
            return task.times
        cuts = task.cuts or ()
        return tuple(dict.fromkeys(cuts[max(len(cuts) * quarter // 4 - 1, 0)] for quarter in (1, 2, 3)) if cuts else ())

    def columns(self, task: TaskSpec) -> list[str]:
        return [f"{task.name}_risk", *(f"{task.name}_survival_{time:.4g}" for time in self.shown_times(task))]

    def cells(self, task: TaskSpec, prediction: Tensor) -> list[list[str]]:
        times, risk = prediction.new_tensor(self.shown_times(task)), self.risk(prediction)
        known = (times <= max(task.cuts or (0.0,))).tolist()
        values = torch.cat([risk[:, None], survival_at(cuts_of(task, prediction), prediction, times)], 1).tolist()
        there = [True, *known]
        return [[f"{value:.6g}" if own else "" for value, own in zip(row, there, strict=True)] for row in values]

    def shown_errors(self, task: TaskSpec, prediction: Tensor, target: Tensor) -> Shown:
        """Thirds by risk: survival as it was and as it was predicted."""
        times = self.shown_times(task)
        expected = survival_at(cuts_of(task, prediction), prediction, prediction.new_tensor(times))
        names, group = ("low", "middle", "high"), torch.zeros(len(target), dtype=torch.int64)
        rows = []
        for number, part in enumerate(self.risk(prediction).argsort().tensor_split(3)):
            if not len(part):
                continue
            group[part] = number
            time, event = target[part].double().numpy().T
            distinct, share = kaplan_meier(time, event)
            seen = np.concatenate([[1.0], share])[np.searchsorted(distinct, times, side="right")]
            left = [int((time > moment).sum()) for moment in times]
            cells = [
                f"{was:.2f} / {said:.2f} ({n})"
                for was, said, n in zip(seen, expected[part].mean(0).tolist(), left, strict=True)
            ]
            rows.append([names[number], str(len(part)), str(int(event.sum())), *cells])
        header = [f"alive after {time:.4g}: observed / predicted (at risk)" for time in times]
        table = Rows(["risk", "bags", "events", *header], rows)
        return Followed(target[:, 0], target[:, 1], group, names, table)


def _scored_times(task: TaskSpec) -> tuple[float, ...]:
    """The cuts but the last: what comes then lies with the few who are left, and may be most of the time."""
    return (task.cuts or ())[:-1]


def _event(where: str, text: str) -> float:
    """1, 0, or NaN where missing, of a cell such as `1`, `dead` or `0:LIVING`."""
    plain = text.lower()
    number = parse_number(plain)
    if number in (0.0, 1.0):
        return number
    if plain[:2] in ("0:", "1:"):
        return float(plain[0])
    if not plain:
        return math.nan
    if plain in _EVENT or plain in _CENSORED:
        return float(plain in _EVENT)
    expected = "0 or 1, true or false, alive or dead, censored or event"
    raise DataError(f"{where}: events: expected {expected}, got {text!r}: which of them is the event must be clear")
