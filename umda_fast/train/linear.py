"""The linear model of bag means, fitted to convergence: alone, and beside every training as the model to beat, or to
mix in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from umda_fast.data import BagDataset
from umda_fast.data.draws import Stream, generator, permutation
from umda_fast.model import Mixture, TaskSpec, decode
from umda_fast.model.baselines.linear import Linear, LinearConfig
from umda_fast.runtime.fabric import processes_of
from umda_fast.runtime.guard import check_batch
from umda_fast.runtime.together import one_decides
from umda_fast.score.collect import Predictions, collect
from umda_fast.score.inference import batches_in_order
from umda_fast.score.intervals import primary_score
from umda_fast.score.mixing import calibrated_losses, mix_task
from umda_fast.score.thresholds import Rule, with_thresholds
from umda_fast.tasks import kind_of
from umda_fast.tasks.kind import FloatArray

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from umda_fast.runtime.config import DataConfig

__all__ = ["beside_linear", "comparison_lines", "fit_linear"]

# Means that are fitted to at most, bags times features.
NUMBERS = 40_000_000
# `1 / C` of a logistic regression whose features are standardised, strongest first: each fit begins at the last one's.
# Two a decade: the best of a ridge regression can be far better than those ten times stronger and weaker.
_PENALTIES: tuple[float, ...] = tuple(10.0 ** (half / 2) for half in range(10, -1, -1))
_FOLDS = 3
# Bags that penalties are chosen on, at most.
_CHOOSING = 1200


def fit_linear(
    model: Linear, dataset: BagDataset, data: DataConfig, seed: int = 0, *, balance: bool = True
) -> dict[str, float]:
    """Fit scaling and heads of `model` (on the CPU) to the bags of `dataset`, or, if their means are more than
    `NUMBERS` numbers, to as many of them, drawn at random.

    A task's head minimises the mean loss of its kind plus `penalty / (2 n) sum W^2`, n the bags with a label, by
    L-BFGS; the penalty is the best of 11 from 1 to 10^5, by the loss in 3-fold cross-validation, of 1200 of the bags at
    most. With `balance` labels of a multilabel task are balanced (the loss of positives times negatives / positives)
    unless the task has class weights of its own, so that rare ones come above the threshold of 1/2.

    Means are standardised, so that a rare feature (a word that few bags have) may say as much as a frequent one, and
    multiplied by the square root of the share of a view's means that are not 0, by which their mean square length is
    the number of features that are not 0 in a bag: thousands of counts of words, nearly all 0, are not louder than a
    dense view because they are many.

    Args:
        data: how the bags are read.
        seed: of the folds and the draw.
        balance: False for logits that are to be added to those of a model trained on the tasks' own losses.

    Returns:
        The penalty of every task.

    Raises:
        DataError: a feature or a label is NaN or infinite.
    """
    most = max(NUMBERS // model.shift.numel(), 2 * _FOLDS)
    if len(dataset) > most:
        drawn = permutation(generator(Stream.LINEAR_FOLDS, seed, 1), len(dataset))[:most]
        dataset = dataset.subset(np.sort(drawn))
    means, present = _read(model, dataset, data)
    _scale(model, means, present)
    x = model.scaled(means, present)
    gram = x @ x.T if x.shape[1] > x.shape[0] else None  # the same for all tasks
    penalties = {}
    for task, head in zip(model.config.tasks, model.heads, strict=True):
        column = dataset.labels[task.name]
        if balance and kind_of(task).thresholded and task.class_weights is None:
            task = kind_of(task).fit(task, column, "balanced")
        keep = ~np.isnan(column if column.ndim == 1 else column[:, 0])
        rows = _Basis(x, gram).of(torch.from_numpy(np.flatnonzero(keep)))
        weight, bias, penalties[task.name] = _fit_task(task, rows, column[keep], seed)
        head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return penalties


def _read(model: Linear, dataset: BagDataset, data: DataConfig) -> tuple[Tensor, Tensor]:
    found = []
    for host in batches_in_order(dataset, data):
        check_batch(host)
        inputs = host.inputs()
        found.append(model.means(inputs["views"], inputs["ptr"], inputs["mask"]))
    return torch.cat([means for means, _ in found]).double(), torch.cat([there for _, there in found])


def _scale(model: Linear, means: Tensor, present: Tensor) -> None:
    start = 0
    for view in model.used:
        columns = slice(start, start + view.width)
        start += view.width
        rows = means[present[:, start - 1], columns]
        if not len(rows):
            continue
        filled = float((rows != 0).double().mean())
        std = rows.std(0, correction=0)
        std = std.where(std > 1e-6 * rows.abs().amax(0), 1.0)
        model.shift[columns] = rows.mean(0).float()
        model.scale[columns] = (std / math.sqrt(filled) if filled > 0.0 else std).float()


def _fit_task(task: TaskSpec, bags: _Basis, column: Any, seed: int) -> tuple[Tensor, Tensor, float]:
    """Weight [outputs, F], bias [outputs] and penalty, of bags that all have the label."""
    kind = kind_of(task)
    n = len(bags.x)
    if n < 2 * _FOLDS:
        constant = torch.from_numpy(kind.constant(task, column))
        return bags.x.new_zeros(task.outputs, bags.x.shape[1]), constant, math.inf
    order = permutation(generator(Stream.LINEAR_FOLDS, seed, 0), n)[:_CHOOSING]
    penalty = _best_penalty(task, bags.of(torch.from_numpy(order)).rows(), column[order])
    rows = bags.rows()
    weight, bias = _path(task, rows, column, [penalty])[-1]
    return bags.weight(rows, weight), bias, penalty


def _best_penalty(task: TaskSpec, rows: Tensor, column: Any) -> float:
    kind, target = kind_of(task), torch.from_numpy(column)
    losses = torch.zeros(len(_PENALTIES), dtype=torch.float64)
    for fold in range(_FOLDS):
        out = np.arange(fold, len(rows), _FOLDS)
        own = np.setdiff1d(np.arange(len(rows)), out)
        for index, (weight, bias) in enumerate(_path(task, rows[own], column[own], _PENALTIES)):
            losses[index] += kind.losses(task, rows[out] @ weight.T + bias, target[out]).sum()
    return _PENALTIES[int(losses.nan_to_num(math.inf).argmin())]


@dataclass(frozen=True)
class _Basis:
    """Features x [n, F], with the inner products of all rows, [n, n], where there are more features than rows, and with
    them rows of no more than n columns: what a ridge sees of many features.

    `x x^T = L L^T` by Cholesky; the minimum of a loss of `L w` plus `|w|^2` is that of `x W` with `W = x^T L^-T w`,
    which has the same length.
    """

    x: Tensor
    gram: Tensor | None

    def of(self, rows: Tensor) -> _Basis:
        """Some of the rows, int64 [m]."""
        return _Basis(self.x[rows], None if self.gram is None else self.gram[rows[:, None], rows])

    def rows(self) -> Tensor:
        """L, or x where it has no more features than rows, or had not when `gram` was made."""
        if self.gram is None:
            return self.x
        gram = self.gram.clone()
        gram.diagonal().add_(1e-9 * gram.diagonal().mean().clamp_min(1e-300))
        found: Tensor = torch.linalg.cholesky(gram)
        return found

    def weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[outputs, F] of one for `rows()`."""
        if self.gram is None:
            return weight
        found: Tensor = torch.linalg.solve_triangular(rows.T, weight.T, upper=True).T @ self.x
        return found


def _path(task: TaskSpec, x: Tensor, column: Any, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias for every penalty, each from where the last ended."""
    kind, target = kind_of(task), torch.from_numpy(column)
    weight = x.new_zeros(task.outputs, x.shape[1]).requires_grad_()
    bias = torch.from_numpy(kind.constant(task, column)).requires_grad_()
    found = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=60, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def closure(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = kind.loss(task, x @ weight.T + bias, target, None)
            loss = loss + 0.5 * penalty / len(x) * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append((weight.detach().clone(), bias.detach().clone()))
    return found


def beside_linear(
    model: Any,
    train: BagDataset,
    val: BagDataset,
    fabric: Fabric,
    data: DataConfig,
    seed: int,
    *,
    mix: bool,
    thresholds: Rule = "half",
) -> tuple[Any, dict[str, Any]]:
    """The linear model fitted to `train` beside `model` on `val`, and mixed into it.

    Every process calls it: each fits, and all take what process 0 found.

    Args:
        model: on the fabric's device; left as it is.
        mix: weigh the two against each other on `val` (see `mix_task`).
        thresholds: how those of multilabel tasks are chosen; each model is scored with its own.

    Returns:
        `model`, or the `Mixture` if the linear model has a part in any task; and what was found: `tasks`: task ->
        `metric` (its primary), `model` and `linear` (the scores on `val`); `penalties`; `below`, the tasks in which
        what is returned scores less than the linear model; `worse`, those in which it scores less than `model` alone,
        though its loss is not greater. With `mix` a task further has `mixture` (the score of the two together),
        `losses` of the three at their best temperatures, and of the linear model's part `weight`, `best`, `deviation`,
        `gain` and `error` (see `umda_fast.score.mixing.Addition`).

    Raises:
        DataError: a feature or a label is NaN or infinite.
    """
    linear = Linear(LinearConfig(train.views, train.tasks))
    penalties = fit_linear(linear, train, data, seed, balance=not mix)
    processes = processes_of(fabric)
    if processes is not None:
        linear.load_state_dict(processes.object_from_first(linear.state_dict()))
    fabric.to_device(linear)

    def measure() -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
        found = [collect(one, val, fabric, data) for one in (model, linear)]
        labels = train.labels
        each = {task.name: _beside(task, found, mix, thresholds, labels[task.name]) for task in train.tasks}
        return {name: told for name, (told, _) in each.items()}, {name: own for name, (_, own) in each.items()}

    tasks, coefficients = one_decides(processes, measure)
    used = {name: told["mixture" if mix else "model"] for name, told in tasks.items()}
    below = [name for name, told in tasks.items() if used[name] < told["linear"]]
    worse = [name for name, told in tasks.items() if used[name] < told["model"]]
    if any(own[1] != 0.0 for own in coefficients.values()):
        model = Mixture(model, {Linear.architecture: linear}, coefficients).eval()
    return model, {"tasks": tasks, "penalties": penalties, "below": below, "worse": worse}


def _beside(
    task: TaskSpec, found: Sequence[Predictions], mix: bool, thresholds: Rule, trained: FloatArray
) -> tuple[dict[str, Any], tuple[float, ...]]:
    """What is told of a task, and the coefficients of the two, of which `found` are the predictions."""
    (own, target), (linear, _) = (predictions.of(task) for predictions in found)
    metric = kind_of(task).primary

    def score(logits: Tensor) -> float:
        decided = with_thresholds(task, logits, target, thresholds, trained)
        return primary_score(decided, decode(task, logits.double()).numpy(), target.double().numpy())

    told: dict[str, Any] = {"metric": metric, "model": score(own), "linear": score(linear)}
    if not mix or not len(target):
        return told | ({"mixture": told["model"], "weight": 0.0} if mix else {}), (1.0, 0.0)
    mixture = mix_task(task, [own, linear], target)
    mixed = sum(c * logits.double() for c, logits in zip(mixture.coefficients, (own, linear), strict=True))
    assert isinstance(mixed, Tensor)
    losses = {}
    for name, logits in (("model", own), ("linear", linear), ("mixture", mixed)):
        each, counts = calibrated_losses(task, logits, target)
        losses[name] = float((each * counts).sum() / counts.sum())
    (added,) = mixture.additions
    told |= {"mixture": score(mixed), "losses": losses}
    return told | {key: value for key, value in vars(added).items() if key != "scale"}, mixture.coefficients


def comparison_lines(comparison: Mapping[str, Any]) -> list[str]:
    """What `beside_linear` found, a line for each task, and a warning if there is one to give."""
    lines = []
    for task, scores in comparison["tasks"].items():
        line = f"{task}: {scores['metric']} {scores['model']:.4f}, linear model {scores['linear']:.4f}"
        if "weight" in scores:
            mixed = f"mixed with weight {scores['weight']:.2f} {scores['mixture']:.4f}"
            line += f", {mixed if scores['weight'] > 0.0 else 'not mixed in'}"
        lines.append(line)
    if comparison["below"]:
        lines.append(
            f"warning: below a linear model of bag means on validation bags: {', '.join(comparison['below'])}"
        )
    if comparison.get("worse"):
        lines.append(
            f"warning: the mixture's loss on validation bags is not greater than the model's, but its score is less: "
            f"{', '.join(comparison['worse'])} (train.linear=beside leaves the model as it is)"
        )
    return lines
