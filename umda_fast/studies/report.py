"""A run as one HTML file that needs nothing else: scores with intervals, curves, errors, calibration, maps."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from torch import Tensor

from umda_fast import ops
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.files import write_text
from umda_fast.model import TaskSpec, decode
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.score.calibration import calibration_error, confidence, fit_calibration, risk_coverage
from umda_fast.score.collect import Predictions, collect
from umda_fast.score.intervals import primary_score
from umda_fast.score.metrics import TaskMetrics
from umda_fast.studies.curves import class_scores, plot_curves, worst_bags
from umda_fast.studies.followed import logrank_p, plot_followed
from umda_fast.studies.maps import BagMap, attention_maps, plot_maps
from umda_fast.studies.predict import mixed_note
from umda_fast.tasks import kind_of
from umda_fast.tasks.metric_names import metric_name
from umda_fast.tasks.shown import Followed, Rows, Scatter, Shown
from umda_fast.train.chosen import ALL
from umda_fast.train.data import is_own, measured_split, model_data
from umda_fast.train.loading import Run
from umda_fast.train.measure import LEVEL, intervals, patients_of_bags

__all__ = ["write_report"]

_MOST_CLASSES = 30  # in a confusion matrix

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; text-align: right; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #e5e5e5; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } .note { color: #555; } figure { margin: 1rem 0; } code { font-size: 90%; }
.scroll { overflow-x: auto; } details { margin: 1rem 0; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1rem; }
"""


def write_report(
    run: Run,
    out: str | os.PathLike[str] | None = None,
    *,
    source: str | None = None,
    datasets: Mapping[str, BagDataset] | None = None,
    split: str | None = None,
    maps: int = 4,
    patch_size: float | None = None,
    samples: int = 1000,
    format: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    skip_bad: bool = False,
    progress: bool = True,
) -> Path:
    """Write an HTML file on a run and its model's predictions for a split of `source` (or of `datasets`; the run's own
    data without either).

    Args:
        out: the file; None for report.html in the run directory.
        split: what is measured, as of `evaluate`. Temperatures are fitted on the split `val`, if there is one and its
            bags are others.
        maps: so many bags with coordinates are drawn, those with the most instances.
        patch_size: edge of a patch in the unit of the coordinates, see `explain`.
        samples: draws of bags for the confidence intervals.
        skip_bad: leave out what is bad in the source and list it on standard error.

    Returns:
        The file.

    Raises:
        DataError: the data cannot be read or does not fit the model, or the split holds no bags.
    """
    files = RunDirectory(run.directory)
    path = run.directory / "report.html" if out is None else Path(out)

    def data(part: str) -> tuple[BagDataset, Any]:
        return model_data(
            run,
            source=source,
            datasets=datasets,
            split=part,
            format=format,
            device=device,
            skip_bad=skip_bad,
            measured=True,
        )

    def measure(part: BagDataset, fabric: Any) -> Predictions:
        model = fabric.to_device(run.model)
        return collect(model, part, fabric, run.config.data, title="report", progress=progress)

    if datasets is None:
        split = measured_split(run, source, split)
    split = split or "test"
    with ops.prefer_backend(backend):
        dataset, fabric = data(split)
        if not len(dataset):
            raise DataError(f"{source or run.config.data.source}: split {split!r} holds no bags to report on")
        found = measure(dataset, fabric)
        held_out: Predictions | None = None
        # All of other data has the bags of its own val in it; that of the run's own data has not.
        if split != "val" and (split != ALL or (datasets is None and is_own(run, source))):
            try:
                validation, fabric = data("val")
            except DataError:  # there is no such split
                validation = dataset.subset(np.zeros(0, dtype=np.int64))
            if len(validation):
                held_out = measure(validation, fabric)
        bags = _largest_with_coords(run, dataset, fabric, maps, patch_size)
    tasks, mixed = dataset.tasks, mixed_note(run)
    sections = [
        _header(run, dataset, split, files, mixed),
        _scores(tasks, found, samples, patients_of_bags(run, dataset, own=datasets is not None or is_own(run, source))),
        _curves(tasks, found),
        _errors(tasks, found, dataset.names),
        _calibration(tasks, found, held_out),
        _plots(files),
        _maps(tasks, [view.name for view in run.model.config.views], bags, mixed),
        _configuration(files),
    ]
    title = escape(f"{run.directory.name}: {dataset.name}")
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n",
    )
    return path


def _largest_with_coords(
    run: Run, dataset: BagDataset, fabric: Any, count: int, patch_size: float | None
) -> list[BagMap]:
    rows = (-dataset.sizes).argsort(kind="stable")[:count]
    names = [dataset.names[row] for row in rows if dataset.sizes[row]]
    if not names:
        return []
    found = attention_maps(run, dataset, fabric, wanted=names, patch_size=patch_size)
    placed = (bag.placed for bag, _ in found)
    return [bag for bag in placed if bag.coords is not None and len(bag.coords) and bag.patch == bag.patch]


# ---- pieces of HTML ----


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _image(content: bytes, alt: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def _picture(figure: Figure, alt: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return _image(stream.getvalue(), alt)


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _number(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None or value != value else f"{value:.{digits}f}"


def _figure(columns: int, *, side: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(side * columns, side * 0.95), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


# ---- sections ----


def _header(run: Run, dataset: BagDataset, split: str, files: RunDirectory, mixed: str) -> str:
    metrics = json.loads(files.metrics.read_text(encoding="utf-8")) if files.metrics.is_file() else {}
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    rows = [
        ("data", f"{dataset.name}, split {split}"),
        ("bags, instances", f"{len(dataset):,}, {int(dataset.sizes.sum()):,}"),
        ("views", ", ".join(f"{view.name} ({view.width})" for view in dataset.views)),
        ("tasks", ", ".join(_described(task) for task in dataset.tasks)),
        ("model", f"{run.config.model['architecture']}, {parameters:,} parameters"),
    ]
    if mixed:
        rows.append(("mixture", mixed))
    rows += [("bags left out, new or gone", note) for note in run.notes]
    if "versions" in metrics:  # not of a model with new heads
        rows += [
            ("training", f"{metrics['seconds']:.0f} s, {metrics['instances_per_second']:,.0f} instances per second"),
            ("versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())),
        ]
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    style = ' style="text-align:left"'
    body = body.replace("<td>", f"<td{style}>")
    return f"<h1>{escape(run.directory.name)}</h1>\n<table>{body}</table>"


def _described(task: TaskSpec) -> str:
    positive = kind_of(task).positive(task)
    return f"{task.name} ({task.kind}{'' if positive is None else f', probability of {positive}'})"


def _scores(
    tasks: Sequence[TaskSpec], found: Predictions, samples: int, patients: Sequence[str] | None = None
) -> str:
    metrics = TaskMetrics(tasks)
    metrics.update(found.logits, found.labels, found.masks)
    values = metrics.compute()
    between = intervals(tasks, found, patients, samples)
    rows = []
    scores = []
    for task in tasks:
        logits, target = found.of(task)
        low, high = (between[task.name][end] for end in ("low", "high"))
        score = primary_score(task, decode(task, logits.double()).numpy(), target.double().numpy())
        scores.append(score)
        interval, primary = _between(low, high), kind_of(task).primary
        others = ", ".join(
            f"{metric_name(name)} {_number(values[task.name][name])} ({_between(**ends)})"
            for name, ends in between[task.name]["others"].items()
        )
        rows.append([task.name, str(len(target)), str(metric_name(primary)), _number(score), interval, others])
    units = "bags" if patients is None else "patients"
    defined = [score for score in scores if score == score]
    mean = _number(sum(defined) / len(defined) if defined else None, 4)
    return (
        f"<h2>Scores</h2>\n<p>mean_score <strong>{mean}</strong></p>\n"
        + _table(["task", "labelled bags", "metric", "score", f"{LEVEL:.0%} interval", "other metrics"], rows)
        + _note(f"Intervals: percentile bootstrap over {units}, {samples} draws, and at least as wide as so few "
                f"{units} allow (of an AUROC by Newcombe's formula, else of classes by Wilson's); they say how much "
                f"the score would vary with other {units}, not with another training.")
    )  # fmt: skip


def _between(low: float, high: float) -> str:
    return "n/a" if low != low else f"{low:.3f} to {high:.3f}"


def _curves(tasks: Sequence[TaskSpec], found: Predictions) -> str:
    parts = []
    for task in tasks:
        logits, target = found.of(task)
        scores = class_scores(task, decode(task, logits), target) if len(target) else []
        if scores:
            parts.append(_picture(plot_curves(task.name, scores), f"{task.name}: ROC and precision-recall curves"))
    if not parts:
        return ""
    note = _note(
        "One class against all others, with the labelled bags that are of it; dotted: what guessing gives. Areas of "
        "these very bags, without an interval."
    )
    return "\n".join(["<h2>Curves</h2>", note, *parts])


def _errors(tasks: Sequence[TaskSpec], found: Predictions, names: Sequence[str]) -> str:
    parts = ["<h2>Errors</h2>"]
    for task in tasks:
        logits, target = found.of(task)
        if not len(target):
            continue
        prediction = decode(task, logits)
        shown = kind_of(task).shown_errors(task, prediction, target)
        parts += [f"<h3>{escape(task.name)}</h3>", _shown(task.name, shown)]
        labelled = [name for name, there in zip(names, found.masks[task.name].tolist(), strict=True) if there]
        worst = worst_bags(task, prediction, target, labelled)
        if worst is not None and not worst[1]:
            parts.append(_note("No bag is predicted wrongly."))
        elif worst is not None:
            parts += [_note("Bags, the worst first:"), _table(*worst)]
    return "\n".join(parts)


def _shown(name: str, shown: Shown) -> str:
    if isinstance(shown, Rows):
        return _table(shown.header, shown.rows)
    if isinstance(shown, Scatter):
        return _picture(_scatter(name, shown.predicted, shown.target), f"{name}: prediction against label")
    if isinstance(shown, Followed):
        p = logrank_p(shown, 0, len(shown.names) - 1)
        between = f"Log-rank test of {shown.names[0]} against {shown.names[-1]} risk: p = {p:.2g}." if p == p else ""
        curves = _picture(plot_followed(name, shown), f"{name}: survival by risk")
        return _table(shown.table.header, shown.table.rows) + curves + _note(between)
    if len(shown.names) > _MOST_CLASSES:
        return _note(f"{len(shown.names)} classes: too many for a confusion matrix.")
    counts = confusion_matrix(shown.target.numpy(), shown.predicted.numpy(), labels=range(len(shown.names)))
    return _picture(_confusion(counts, shown.names), f"{name}: confusion matrix")


def _scatter(name: str, prediction: Tensor, target: Tensor) -> Figure:
    figure, (axis,) = _figure(1, side=4.2)
    axis.plot(target, prediction, ".", alpha=0.5, color="#0072B2")
    ends = [float(min(target.min(), prediction.min())), float(max(target.max(), prediction.max()))]
    axis.plot(ends, ends, color="0.5", linewidth=1)
    axis.set(xlabel="label", ylabel="prediction", title=name)
    return figure


def _confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    side = max(3.6, 0.42 * len(names) + 2)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
    for (i, j), count in np.ndenumerate(counts):
        colour = "white" if share[i, j] > 0.5 else "black"
        axis.text(j, i, str(count), ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted", ylabel="label")
    figure.colorbar(image, ax=axis, label="share of the label's bags", shrink=0.8)
    return figure


def _calibration(tasks: Sequence[TaskSpec], found: Predictions, held_out: Predictions | None) -> str:
    classified = [task for task in tasks if _has_confidence(task) and len(found.of(task)[1])]
    if not classified:
        return ""
    parts = ["<h2>Calibration</h2>"]
    fitted = None
    if held_out is not None:
        fitted = fit_calibration(tasks, held_out.logits, held_out.labels, held_out.masks)
    rows = []
    figure, axes = _figure(2)
    for index, task in enumerate(classified):
        logits, target = found.of(task)
        calibrated = logits if fitted is None else fitted.apply({task.name: logits})[task.name]
        row = [task.name, _number(calibration_error(task, logits, target))]
        if fitted is not None:
            temperature = fitted.temperatures.get(task.name)
            row += [_number(temperature, 2), _number(calibration_error(task, calibrated, target))]
        rows.append(row)
        colour = f"C{index % 10}"
        axes[0].plot(*_reliability(task, calibrated, target), marker="o", markersize=3, color=colour, label=task.name)
        correct = kind_of(task).correct(task, decode(task, calibrated), target)
        coverage, risk = risk_coverage(confidence(task, calibrated), correct)
        axes[1].plot(coverage, risk, color=colour)
    axes[0].plot([0, 1], [0, 1], color="0.5", linewidth=1)
    axes[0].set(xlabel="predicted probability", ylabel="observed share", title="Reliability")
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].set(xlabel="share of bags kept", ylabel="share of errors among them", title="Referring the least certain")
    axes[1].set_ylim(bottom=0)
    header = ["task", "expected calibration error"]
    header += [] if fitted is None else ["temperature, fitted on val", "error after it"]
    parts += [_table(header, rows), _picture(figure, "reliability and risk-coverage curves")]
    parts += [_note(line) for line in ([] if fitted is None else fitted.explained())]
    if fitted is None:
        parts.append(_note("No other split to fit temperatures on: probabilities are as the model gives them."))
    return "\n".join(parts)


def _has_confidence(task: TaskSpec) -> bool:
    return kind_of(task).decides and kind_of(task).calibration == "temperature"


def _reliability(task: TaskSpec, logits: Tensor, target: Tensor, bins: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Mean probability and observed share in bins of equal counts."""
    probabilities, came_true = kind_of(task).reliability(task, decode(task, logits).double(), target)
    given, hit = probabilities.numpy(), came_true.double().numpy()
    order = given.argsort(kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return np.array([given[part].mean() for part in parts]), np.array([hit[part].mean() for part in parts])


def _plots(files: RunDirectory) -> str:
    pictures = sorted(files.plots.glob("*.png")) if files.plots.is_dir() else []
    if not pictures:
        return ""
    images = [_image(path.read_bytes(), path.stem.replace("_", " ")) for path in pictures]
    return "<h2>Training</h2>\n" + "\n".join(images)


def _maps(tasks: Sequence[TaskSpec], views: Sequence[str], bags: Sequence[BagMap], mixed: str) -> str:
    if not bags:
        return ""
    parts = ["<h2>Where the model looked</h2>", _note("The largest bags of the split; `umda-fast explain` draws all.")]
    if mixed:
        parts.append(_note(f"{mixed[0].upper()}{mixed[1:]}."))
    if any(bag.guessed for bag in bags):
        parts.append(_note("The size of the patches is guessed from the distances between them: --patch-size says it."))
    for bag in bags:
        share = bag.relative
        panels = {task.name: share[:, t] for t, task in enumerate(tasks)}
        names = list(panels)
        for first in range(0, len(names), 4):
            chosen = {name: panels[name] for name in names[first : first + 4]}
            parts.append(_picture(plot_maps(bag, chosen, bag.title, "attention (1: all alike)", 0.0), bag.title))
        if bag.views is not None:
            weights = {view: bag.views[:, v] for v, view in enumerate(views[:4])}
            parts.append(_picture(plot_maps(bag, weights, f"{bag.title}: views", "weight", 0.0), f"{bag.title}, views"))
    return "\n".join(parts)


def _configuration(files: RunDirectory) -> str:
    text = escape(files.config.read_text(encoding="utf-8"))
    return f"<h2>Configuration</h2>\n<details><summary>config.yaml</summary><pre>{text}</pre></details>"
