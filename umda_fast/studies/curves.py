"""How well classes are told apart at every threshold, and the bags that a model is most wrong about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch import Tensor

from umda_fast.model import TaskSpec
from umda_fast.tasks import Classes, OneClass, Values, kind_of

__all__ = ["ClassScores", "class_scores", "plot_curves", "worst_bags"]

Array = npt.NDArray[Any]

_MOST_CURVES = 10  # of one task, or none could be told from another


@dataclass(frozen=True)
class ClassScores:
    """One class against all others.

    Attributes:
        name: of the class.
        probability: predicted for it, float64 [B]. truth: whether a bag is of it, bool [B].
    """

    name: str
    probability: Array
    truth: Array


def class_scores(task: TaskSpec, prediction: Tensor, target: Tensor) -> list[ClassScores]:
    """The classes of a task that both occur and do not among the labels: of a binary task the positive one, else each
    against the others, of a multilabel task each label. None for a kind without classes.

    Args:
        prediction: as `decode` gives it. target: [B] or, multilabel, [B, C].
    """
    kind = kind_of(task)
    if not isinstance(kind, Classes):
        return []
    given, labels = prediction.double().numpy(), target.double().numpy()
    if given.shape[1] == 1:
        columns = {task.class_names[-1]: labels == 1}
    elif kind.several:
        columns = {name: labels[:, number] == 1 for number, name in enumerate(task.class_names)}
    else:
        columns = {name: labels == number for number, name in enumerate(task.class_names)}
    return [
        ClassScores(name, given[:, number], truth)
        for number, (name, truth) in enumerate(columns.items())
        if 0 < truth.sum() < len(truth)
    ]


def plot_curves(name: str, scores: Sequence[ClassScores]) -> Figure:
    """ROC and precision-recall curves side by side, at most ten classes, the commonest, with their areas; in grey what
    guessing gives."""
    shown = sorted(scores, key=lambda score: -score.truth.sum())[:_MOST_CURVES]
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, score in enumerate(shown):
        style = {"color": f"C{number}", "linewidth": 1.6}
        bags = f"{int(score.truth.sum())} of {len(score.truth)}"
        false, true, _ = roc_curve(score.truth, score.probability)
        area = roc_auc_score(score.truth, score.probability)
        left.plot(false, true, label=f"{score.name} ({bags}): {area:.3f}", **style)
        precision, recall, _ = precision_recall_curve(score.truth, score.probability)
        area = average_precision_score(score.truth, score.probability)
        right.step(recall, precision, where="post", label=f"{score.name}: {area:.3f}", **style)
        right.axhline(score.truth.mean(), color=f"C{number}" if len(shown) > 1 else "0.5", linewidth=0.8, linestyle=":")
    left.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, linestyle=":")
    left.set(xlabel="1 - specificity", ylabel="sensitivity", title=f"{name}: ROC, area")
    right.set(xlabel="recall (sensitivity)", ylabel="precision", title=f"{name}: precision, average over recall")
    for axis, place in ((left, "lower right"), (right, "lower left")):
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), aspect="equal")
        axis.legend(fontsize=8, loc=place)
    if len(scores) > len(shown):
        figure.suptitle(f"the {len(shown)} commonest of {len(scores)} classes", fontsize=9)
    return figure


def worst_bags(
    task: TaskSpec, prediction: Tensor, target: Tensor, names: Sequence[str], most: int = 20
) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of the bags that are predicted wrongly, the worst first: of classes those whose own class has the
    least probability, of a number those furthest off. None for a kind whose label is neither.

    Args:
        prediction: as `decode` gives it, [B, outputs]. target: [B]. names: of the B bags. most: rows.
    """
    kind = kind_of(task)
    if isinstance(kind, Values):
        error = (prediction[:, 0].double() - target.double()).numpy()
        order = np.argsort(-np.abs(error), kind="stable")[:most]
        numbers = [(names[row], float(target[row]), float(prediction[row, 0]), float(error[row])) for row in order]
        rows = [[name, f"{label:.4g}", f"{said:.4g}", f"{off:+.4g}"] for name, label, said, off in numbers]
        return ["bag", "label", "predicted", "error"], rows
    if not isinstance(kind, OneClass):
        return None
    chosen = kind.predicted(task, prediction).long().numpy()
    label = target.long().numpy()
    given = prediction.double().numpy()
    if given.shape[1] == 1:
        given = np.concatenate([1.0 - given, given], axis=1)
    own = given[np.arange(len(label)), label]
    wrong = np.flatnonzero(chosen != label)
    order = wrong[np.argsort(own[wrong], kind="stable")][:most]
    classes = task.class_names
    return (
        ["bag", "label", "predicted", "probability of the label"],
        [[names[row], classes[label[row]], classes[chosen[row]], f"{own[row]:.3f}"] for row in order.tolist()],
    )
