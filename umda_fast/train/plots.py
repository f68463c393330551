"""Pictures of a run, drawn from metrics.jsonl and the final result; no display is needed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from umda_fast.files import atomic_file
from umda_fast.model import TaskSpec, ViewSpec
from umda_fast.runtime.rundir import RunDirectory, read_metrics
from umda_fast.score.evaluation import SplitResult
from umda_fast.tasks import kind_of
from umda_fast.tasks.metric_names import metric_name

__all__ = ["plot_run"]

# Okabe and Ito's colours, told apart with any colour vision; lines beyond eight change their dashes.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
_DASHES = ["-", "--", ":", "-."]
_MOST_METRICS = 3


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
    }


def _panels(count: int, *, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for axis in axes:
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=130)


def _series(records: Sequence[Mapping[str, Any]], get: Callable[[Mapping[str, Any]], Any]) -> np.ndarray:
    values = []
    for record in records:
        try:
            value = get(record)
        except KeyError:
            value = None
        values.append(math.nan if value is None else float(value))
    return np.asarray(values)


def _line(axis: Axes, x: Any, y: Any, **options: Any) -> bool:
    if not np.isfinite(y).any():
        return False
    # A line through one point is invisible.
    axis.plot(x, y, marker="o" if np.isfinite(y).sum() < 2 else None, markersize=3, linewidth=1.5, **options)
    return True


def _legend(axis: Axes, entries: int) -> None:
    if entries:
        axis.legend(fontsize=8, frameon=False, ncols=1 if entries <= 6 else 2)


def plot_losses(epochs: Sequence[Mapping[str, Any]], tasks: Sequence[TaskSpec]) -> Figure:
    """A panel for each task: training and validation loss by epoch."""
    figure, axes = _panels(len(tasks))
    x = [record["epoch"] + 1 for record in epochs]
    for axis, task in zip(axes, tasks, strict=True):
        curves = {
            "train": _series(epochs, lambda r, n=task.name: r["train"][f"loss/{n}"]),  # type: ignore[misc]
            "validation": _series(epochs, lambda r, n=task.name: r["val"]["losses"][n]),  # type: ignore[misc]
        }
        drawn = [_line(axis, x, y, label=name, **_style(i)) for i, (name, y) in enumerate(curves.items())]
        positive = all((y[np.isfinite(y)] > 0).all() for y in curves.values())
        if positive and any(drawn):
            axis.set_yscale("log")
        axis.set(title=task.name, xlabel="epoch", ylabel=kind_of(task).loss_name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axis, sum(drawn))
    figure.suptitle("Loss of each task by epoch")
    return figure


def plot_metrics(epochs: Sequence[Mapping[str, Any]], tasks: Sequence[TaskSpec]) -> Figure:
    """A panel for the first metrics of each task on the validation split by epoch, and one for the mean score."""
    figure, axes = _panels(len(tasks) + 1)
    x = [record["epoch"] + 1 for record in epochs]
    for axis, task in zip(axes, tasks, strict=False):
        names = list(epochs[-1].get("val", {}).get("tasks", {}).get(task.name, {}))
        names.sort(key=lambda metric: metric != kind_of(task).primary)
        names = names[:_MOST_METRICS]
        lines = 0
        for index, metric in enumerate(names):
            y = _series(epochs, lambda r, n=task.name, m=metric: r["val"]["tasks"][n][m])  # type: ignore[misc]
            label = str(metric_name(metric))
            if metric_name(metric).in_label_units or metric_name(metric).lower_is_better:
                other = axis.twinx()
                other.spines["top"].set_visible(False)
                _line(other, x, y, **_style(index))
                other.set_ylabel(label, color=_style(index)["color"])
                other.set_ylim(bottom=0)
                continue
            lines += _line(axis, x, y, label=label, **_style(index))
        axis.set(title=task.name, xlabel="epoch", ylabel="score (1 is perfect)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axis, lines)
    best = epochs[-1].get("best_epoch", -1)
    axis = axes[-1]
    lines = _line(axis, x, _series(epochs, lambda r: r["val"]["mean_score"]), label="mean_score", **_style(0))
    lines += _line(axis, x, _series(epochs, lambda r: r["val"]["skill"]["mean"]), label="skill", **_style(2))
    lines += _line(
        axis,
        x,
        _series(epochs, lambda r: r["val"]["view_consistency"]),
        label="view consistency",
        **_style(1),
    )
    if best >= 0 and lines:
        axis.axvline(best + 1, color="0.5", linewidth=1, linestyle=":", label=f"best epoch ({best + 1})")
    axis.set(
        title="mean_score (mean of each task's blue line)", xlabel="epoch", ylabel="score (1 is perfect)"
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axis, lines and lines + 1)
    figure.suptitle("Validation metrics by epoch")
    return figure


def plot_weights(steps: Sequence[Mapping[str, Any]], tasks: Sequence[TaskSpec]) -> Figure:
    """The weight of each task's loss by step."""
    figure, (axis,) = _panels(1, width=7.0, height=4.0)
    x = [record["step"] for record in steps]
    for index, task in enumerate(tasks):
        y = _series(steps, lambda r, n=task.name: r["sgl"][f"weight/{n}"])  # type: ignore[misc]
        _line(axis, x, y, label=task.name, **_style(index))
    axis.axhline(1.0, color="0.5", linewidth=1, linestyle=":")
    axis.set(title="Weight of each task's loss (equal weights: 1)", xlabel="step", ylabel="weight")
    axis.set_ylim(bottom=0)
    _legend(axis, len(tasks))
    return figure


def plot_cosines(steps: Sequence[Mapping[str, Any]], tasks: Sequence[TaskSpec]) -> Figure:
    """Cosines between the tasks' gradients: by step for each pair (few tasks), and their mean over the
    run.
    """
    names = [task.name for task in tasks]
    pairs = list(combinations(names, 2))
    draw_lines = 0 < len(pairs) <= 12
    figure = Figure(figsize=(12.0 if draw_lines else 6.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    x = [record["step"] for record in steps]
    mean = np.eye(len(names))
    largest = 0.1
    if draw_lines:
        axis = figure.add_subplot(1, 2, 1)
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for index, (first, second) in enumerate(pairs):
        y = _series(steps, lambda r, k=f"cosine/{first}/{second}": r["sgl"][k])  # type: ignore[misc]
        if np.isfinite(y).any():
            i, j = names.index(first), names.index(second)
            mean[i, j] = mean[j, i] = np.nanmean(y)
            largest = max(largest, float(np.nanmax(np.abs(y))))
        if draw_lines:
            _line(axis, x, y, label=f"{first}, {second}", **_style(index))
    if draw_lines:
        axis.axhline(0.0, color="0.3", linewidth=1)
        axis.set_ylim(-1.1 * largest, 1.4 * largest)  # room for the legend
        axis.set(
            title="By step (below 0: the tasks conflict)", xlabel="step", ylabel="cosine of the gradients"
        )
        axis.legend(fontsize=8, frameon=False, ncols=2)
    axis = figure.add_subplot(1, 2 if draw_lines else 1, 2 if draw_lines else 1)
    _heatmap(figure, axis, mean, names, names, low=-1.0, high=1.0, colours="RdBu", unit="cosine")
    axis.set_title("Mean over the run")
    figure.suptitle("Cosines between the tasks' gradients")
    return figure


def _heatmap(
    figure: Figure,
    axis: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
    colours: str,
    unit: str,
) -> None:
    image = axis.imshow(values, vmin=low, vmax=high, cmap=colours)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)
    if values.size <= 400:
        for i in range(values.shape[0]):
            for j in range(values.shape[1]):
                red, green, blue, _ = image.cmap(image.norm(values[i, j]))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                text = f"{values[i, j]:.2f}"
                axis.text(
                    j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
    figure.colorbar(image, ax=axis, label=unit, shrink=0.85)


def _shares(values: np.ndarray, names: Sequence[str], title: str, row: str, column: str) -> Figure:
    """A matrix whose rows sum to 1."""
    side = max(4.5, 0.5 * len(names) + 2.5)
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    _heatmap(figure, axis, values, names, names, low=0.0, high=1.0, colours="viridis", unit="share (rows sum to 1)")
    axis.set(title=title, xlabel=column, ylabel=row)
    return figure


def plot_run(
    run: RunDirectory, views: Sequence[ViewSpec], tasks: Sequence[TaskSpec], result: SplitResult
) -> list[Path]:
    """Draw everything there is to draw into plots/; returns the files written."""
    records = read_metrics(run.log)
    epochs = [record for record in records if record["kind"] == "epoch"]
    guided = [record for record in records if record["kind"] == "step" and "sgl" in record]
    figures: dict[str, Figure] = {}
    if epochs:
        figures["losses"] = plot_losses(epochs, tasks)
        figures["metrics"] = plot_metrics(epochs, tasks)
    if guided:
        figures["task_weights"] = plot_weights(guided, tasks)
        if any(key.startswith("cosine/") for record in guided for key in record["sgl"]):
            figures["task_gradient_cosines"] = plot_cosines(guided, tasks)
    if result.view_mass is not None:
        title = "View mass: how much a view listens to each view"
        names = [view.name for view in views]
        figures["view_mass"] = _shares(result.view_mass.numpy(), names, title, "listening view", "view listened to")
    if result.influence is not None:
        title = "Influence: whose private path a task's branch uses"
        names = [task.name for task in tasks]
        figures["influence"] = _shares(result.influence.numpy(), names, title, "task", "task whose path is used")
    os.makedirs(run.plots, exist_ok=True)
    written = []
    for name, figure in figures.items():
        path = run.plots / f"{name}.png"
        _save(figure, path)
        written.append(path)
    return written
