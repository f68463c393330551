"""Few-shot studies: a model trained on k bags of each class, for several k, on the folds of a cross-validation."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from umda_fast.data import Splits
from umda_fast.data.arrays import IntArray
from umda_fast.data.draws import Stream, generator, permutation
from umda_fast.errors import DataError
from umda_fast.files import json_ready, write_json
from umda_fast.model import TaskSpec
from umda_fast.runtime.config import RunConfig
from umda_fast.runtime.fabric import make_fabric, processes_of
from umda_fast.runtime.provenance import stamped
from umda_fast.runtime.together import one_decides
from umda_fast.studies.crossval import check_settings, comparable, cross_validate
from umda_fast.studies.folds import kept_folds
from umda_fast.tasks import kind_of

__all__ = ["FILE", "draw_shots", "few_shot"]

FILE = "shots.json"


def few_shot(
    config: RunConfig,
    out: str | os.PathLike[str],
    shots: Sequence[int],
    *,
    folds: int = 10,
    repeats: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """For each k of `shots` a cross-validation whose runs are trained on k bags of every class (`draw_shots`).

    The folds, and the bags that are tested on, are the same for every k, and the bags drawn for a small k are among
    those for a larger one. There is no validation part, which would be more bags than k: the last weights are taken.

    Args:
        config: of every run. out: holds `shots-K/` for each k, as `cross_validate` leaves it, folds.csv and shots.json,
            brought up to date after every k; what is finished there is not done again.
        shots: distinct numbers of at least 1.
        folds, repeats, progress: as of `cross_validate`.

    Returns:
        What shots.json holds: settings; `results`, for each k its `shots`, `bags` (trained on: `min` and `max` over the
        runs), `lacking` ("task: class" of which some fold has fewer to draw) and of its cross-validation `tasks` and
        `mean_score`, with mean, standard deviation, least and most over the folds.

    Raises:
        DataError: `shots` out of range, no task with classes, bags that are drawn by a seed, or as of `cross_validate`.
    """
    counts = sorted(shots)
    if not counts or counts[0] < 1 or len(set(counts)) < len(counts):
        got = ", ".join(map(str, shots)) or "none"
        raise DataError(f"shots: expected distinct whole numbers of at least 1, got {got}")
    processes = processes_of(make_fabric(config))
    directory = Path(out if processes is None else processes.object_from_first(os.fspath(out)))
    settings = {
        "source": config.data.source,
        "folds": folds,
        "repeats": repeats,
        "shots": counts,
        "config": comparable(config),
    }
    one_decides(processes, lambda: check_settings(directory / FILE, settings, "a few-shot study"))
    parts = [_splits(fold) for fold in kept_folds(config, directory, folds, repeats, processes)]
    results: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    for count in counts:
        drawn = [draw_shots(split, count, config.seed, number) for number, split in enumerate(parts)]
        lacking = sorted({name for split in parts for name in _lacking(split, count)})
        if lacking and (processes is None or processes.rank == 0):
            print(f"{count} shots: some folds have fewer training bags of {', '.join(lacking)}", file=sys.stderr)
        found = cross_validate(
            config,
            directory / f"shots-{count}",
            folds=folds,
            repeats=repeats,
            datasets=[_divided(split, rows) for split, rows in zip(parts, drawn, strict=True)],
            progress=progress,
        )
        sizes = [len(rows) for rows in drawn]
        results.append(
            {
                "shots": count,
                "bags": {"min": min(sizes), "max": max(sizes)},
                "lacking": lacking,
                **{name: found[name] for name in ("tasks", "mean_score")},
            }
        )
        report = one_decides(processes, lambda: stamped("shots", {**settings, "results": results}))
        if processes is None or processes.rank == 0:
            write_json(directory / FILE, report)
    plain: dict[str, Any] = json_ready(report)
    return plain


def _splits(fold: Any) -> Splits:
    if not isinstance(fold, Splits) or fold.drawn:
        raise DataError("shots: expected data of files, whose bags are the same for every k, got bags drawn by a seed")
    return fold


def _classes(tasks: Iterable[TaskSpec], labels: dict[str, Any]) -> dict[str, IntArray]:
    """Rows of the bags of every class, by "task: class"; of a multilabel task of the bags that have the label."""
    rows = {}
    for task in tasks:
        column = labels[task.name]
        for number in range(kind_of(task).class_count(task)):
            is_one = column[:, number] == 1 if kind_of(task).several else column == number
            rows[f"{task.name}: {task.class_names[number]}"] = np.flatnonzero(is_one)
    return rows


def draw_shots(split: Splits, count: int, seed: int, fold: int = 0) -> IntArray:
    """Rows of `split.train`, ascending: for each class of each task with classes (of a multilabel task each label)
    `count` bags at random, of different patients as long as there are some; all where there are no more.

    Classes are drawn one by one, and a bag drawn for one is in the others that it is of, too: with several tasks, or
    labels, there may be more than `count` of a class. Tasks without classes (regression, survival) are learnt from the
    bags that are there. A larger count has all that a smaller one has, for the same seed and fold.

    Raises:
        DataError: no task with classes.
    """
    train = split.train
    classes = _classes(train.tasks, train.labels)
    if not classes:
        raise DataError(
            f"{split.name}: shots: expected a task with classes (binary, multiclass, multilabel, ordinal), got "
            f"{', '.join(task.kind for task in train.tasks) or 'none'}"
        )
    groups = train.groups
    chosen: set[int] = set()
    for number, rows in enumerate(classes.values()):
        order = rows[permutation(generator(Stream.SHOTS, seed, fold, number), len(rows))].tolist()
        if groups is not None:  # one bag of each patient, then second ones, ...
            turn: dict[str, int] = {}
            turns = {}
            for row in order:
                turns[row] = turn[groups[row]] = turn.get(groups[row], 0) + 1
            order.sort(key=turns.__getitem__)
        chosen.update(order[:count])
    return np.array(sorted(chosen), dtype=np.int64)


def _lacking(split: Splits, count: int) -> list[str]:
    """Classes of which fewer than `count` were there to be drawn."""
    return [name for name, own in _classes(split.train.tasks, split.train.labels).items() if len(own) < count]


def _divided(split: Splits, rows: IntArray) -> Splits:
    at = {name: row for row, name in enumerate(split.whole.names)}
    train = [split.train.names[row] for row in rows.tolist()]

    def rows_of(names: Sequence[str]) -> IntArray:
        return np.array([at[name] for name in names], dtype=np.int64)

    return split.divided({"train": rows_of(train), "test": rows_of(split.test.names)})
