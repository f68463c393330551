"""Confidence that can be believed: temperatures, prediction intervals, and which bags to refer to a human.

Sources: temperature scaling, Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; intervals by split
conformal prediction, Lei et al., "Distribution-Free Predictive Inference for Regression", JASA 2018; selective
prediction and its risk-coverage curve, Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks",
NeurIPS 2017.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from umda_fast.errors import DataError
from umda_fast.files import write_json
from umda_fast.model import TaskSpec, decode
from umda_fast.tasks import TaskKind, kind_of

__all__ = ["Calibration", "best_temperature", "calibration_error", "confidence", "fit_calibration", "risk_coverage"]

# Logits are brought to sizes between exp(-7), nothing known, and exp(3), where labels that are told apart without a
# mistake would have them beyond all bounds.
_LOG_TEMPERATURES = (-3.0, 7.0)

_LEAST_BAGS, _LEAST_OTHERS = 20, 5  # for a temperature


@dataclass(frozen=True)
class Calibration:
    """What turns a model's logits into calibrated ones.

    Attributes:
        temperatures: task -> T; logits are divided by it. Tasks with classes, and survival.
        centres: task -> c, of a task whose loss does not depend on what is added to all logits: they become
            `c + (logits - c) / T`, so that what is predicted on the whole stays. 0 for others.
        half_widths: regression task -> half the width of an interval, in original units, that holds the label of a
            new bag with probability `level`.
        level: of the intervals.
        bags: task -> labelled bags it was fitted on.
        left: task -> why nothing was fitted: its probabilities are the model's own, or it has no interval.
    """

    temperatures: dict[str, float] = field(default_factory=dict)
    half_widths: dict[str, float] = field(default_factory=dict)
    level: float = 0.9
    bags: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    centres: dict[str, float] = field(default_factory=dict)

    def apply(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Calibrated logits, task -> [B, outputs]. Which class is the likeliest does not change."""
        return {
            name: self._divided(name, value.float()) if name in self.temperatures else value
            for name, value in logits.items()
        }

    def _divided(self, name: str, logits: Tensor) -> Tensor:
        centre = self.centres.get(name, 0.0)
        return centre + (logits - centre) / self.temperatures[name]

    def explained(self) -> list[str]:
        """What was not fitted, a line for each task."""
        return [f"{task}: not calibrated on validation: {reason}" for task, reason in self.left.items()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, asdict(self))

    def _reconsidered(self) -> Calibration:
        """One of an earlier version, which fitted temperatures on any number of bags, between exp(-3) and exp(3)."""
        kept, left = {}, {}
        for task, temperature in self.temperatures.items():
            if self.bags.get(task, 0) < _LEAST_BAGS:
                left[task] = f"{self.bags.get(task, 0)} labelled bags, expected {_LEAST_BAGS}"
            elif abs(math.log(temperature)) > 2.99:
                left[task] = "its temperature had run to the limit, as where no bag is wrong"
            else:
                kept[task] = temperature
        return replace(self, temperatures=kept, left=left)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """What `save` wrote.

        Raises:
            DataError: the file is missing or is something else.
        """
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
            found = cls(**plain)
            return found if "left" in plain else found._reconsidered()
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{os.fspath(path)}: holds no calibration: {error}") from None


def fit_calibration(
    tasks: Sequence[TaskSpec],
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    label_mask: Mapping[str, Tensor],
    *,
    level: float = 0.9,
) -> Calibration:
    """Fit on bags that the model was not trained on.

    The temperature of a task minimises its cross entropy, without class weights, against labels that are softened as if
    every class had been seen once more (Platt, "Probabilistic outputs for support vector machines", 1999), or, of
    survival, two bags more that are as all training bags together, so that no confidence is beyond what so many bags
    can show. It needs 20 labelled bags, of which, where a bag has one class, 5 are not of the most frequent one, and
    where it has a time, 5 have the event; with fewer it would be an accident of these bags. The half width is the
    `ceil((n + 1) level)`-th smallest of the n absolute residuals; with fewer than that it is infinite and left out.
    What is not fitted stays as it is, and `left` says why.

    Args:
        tasks: of the model.
        logits: task -> [B, outputs]. labels, label_mask: as `BagBatch` holds them.
        level: of the intervals, between 0 and 1.

    Raises:
        ValueError: level out of range.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    found = Calibration(level=level)
    for task in tasks:
        kind, keep = kind_of(task), label_mask[task.name]
        raw, target = logits[task.name][keep].double(), labels[task.name][keep]
        if kind.calibration == "interval":
            half = _conformal_quantile((decode(task, raw)[:, 0] - target).abs(), level)
            if half is not None:
                found.half_widths[task.name] = half
            else:
                found.left[task.name] = f"{len(target)} labelled bags, expected {math.ceil(level / (1 - level) - 1e-9)}"
        elif kind.calibration == "temperature":
            reason = _too_few(kind, kind.outcomes(task, target.double().numpy()), len(target))
            if reason is None:
                plain = replace(task, class_weights=None)
                found.temperatures[task.name] = best_temperature(plain, raw, target, soften=True)
                location = kind.location(task, raw)
                if location is not None:
                    found.centres[task.name] = float(location)
            else:
                found.left[task.name] = reason
        if task.name in found.temperatures or task.name in found.half_widths:
            found.bags[task.name] = len(target)
    return found


def _too_few(kind: TaskKind, outcomes: Sequence[int], bags: int) -> str | None:
    """Why a temperature cannot be fitted on so many labelled bags, of every outcome; None if it can."""
    if bags < _LEAST_BAGS:
        return f"{bags} labelled bags, expected {_LEAST_BAGS}"
    others = bags - max(outcomes, default=0)
    if others < _LEAST_OTHERS:
        return f"{others} {kind.scarce}, expected {_LEAST_OTHERS}"
    return None


def best_temperature(task: TaskSpec, logits: Tensor, target: Tensor, *, soften: bool = False) -> float:
    """The T with the least loss of `logits / T`; 1 for a kind whose logits no temperature divides.

    It is looked for relative to the root mean square of the logits (of several classes, without what all of them
    share), so logits times 10 get a T that is 10 times as large, within rounding.

    Args:
        task: class weights count.
        logits: [B, outputs], B > 0. target: [B] or, multilabel, [B, classes]; every bag has its label.
        soften: as if every class had been seen once more.
    """
    kind, logits = kind_of(task), logits.double()
    if kind.calibration != "temperature":
        return 1.0
    size = float(kind.centred(logits).square().mean().sqrt())
    if not 0.0 < size < math.inf:
        return 1.0

    classes = 2 if kind.several else kind.class_count(task)
    doubt = classes / (len(target) + classes) if soften else 0.0

    def loss(log_temperature: float) -> float:
        scaled = logits / (size * math.exp(log_temperature))
        found = float(kind.loss(task, scaled, target, None))
        return (1.0 - doubt) * found + doubt * float(kind.undecided_loss(task, scaled)) if doubt else found

    # Convex in 1 / T, so there is one minimum; 1e-3 off it costs a millionth part.
    best = minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-3})
    return size * math.exp(float(best.x))


def _conformal_quantile(residuals: Tensor, level: float) -> float | None:
    rank = math.ceil((len(residuals) + 1) * level)
    return None if rank > len(residuals) else float(residuals.double().kthvalue(rank).values)


def confidence(task: TaskSpec, logits: Tensor) -> Tensor:
    """How sure the prediction is, [B] in 0..1: the probability of the class predicted; for a multilabel task that of
    its least certain label; for a regression 1 (it has an interval instead).

    Args:
        logits: [B, outputs], calibrated (`Calibration.apply`).
    """
    return kind_of(task).confidence(task, decode(task, logits))


def calibration_error(task: TaskSpec, logits: Tensor, target: Tensor) -> float:
    """Expected calibration error in 15 bins, 0..1 (for a multilabel task over all its labels together).

    Args:
        logits: [B, outputs]. target: [B] or, multilabel, [B, classes].

    Raises:
        ValueError: a regression, which has no probabilities.
    """
    probabilities, came_true = kind_of(task).reliability(task, decode(task, logits.float()), target)
    return float(binary_calibration_error(probabilities, came_true.long(), n_bins=15))


def risk_coverage(confidences: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """The risk-coverage curve: bags sorted by falling confidence, share kept and share of errors among those kept.

    Args:
        confidences: [B]. correct: bool [B].

    Returns:
        coverage [B] and risk [B], float64; bags of equal confidence are kept or referred together, so they share
        one point.
    """
    order = confidences.argsort(descending=True, stable=True)
    ranked, wrong = confidences[order], (~correct[order]).double()
    kept = torch.arange(1, len(order) + 1, dtype=torch.float64)
    last = torch.searchsorted(-ranked.double(), -ranked.double(), right=True)  # one past the last of equal ones
    return last.double() / max(len(order), 1), (wrong.cumsum(0) / kept)[last - 1] if len(order) else wrong
