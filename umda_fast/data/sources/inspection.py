"""What a source holds, and the first thing wrong with it, as plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch

from umda_fast.data.bag import Bag
from umda_fast.data.columns import ColumnUse
from umda_fast.data.dataset import BagDataset
from umda_fast.data.sources.source import find_format, load_source
from umda_fast.data.splits import SPLITS, Splits
from umda_fast.tasks import TaskSpec, kind_of

QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


@dataclass(frozen=True)
class ViewReport:
    """One view.

    Attributes:
        name, width: of its features.
        missing: split -> share of the instances that lack it; None for a split without instances.
    """

    name: str
    width: int
    missing: dict[str, float | None]


@dataclass(frozen=True)
class TaskReport:
    """One task.

    Attributes:
        name, kind: of the task.
        classes: names of the classes, in the order of `counts`; empty for a kind without.
        positive: binary only: the class whose probability is predicted.
        counts: split -> labelled bags of every class (multilabel: positives of every label).
        labelled, missing: split -> bags with and without a label.
        values: split -> mean, std, min, max of the labels of a regression; events, censored, min, max of survival.
    """

    name: str
    kind: str
    classes: list[str]
    positive: str | None
    counts: dict[str, list[int]]
    labelled: dict[str, int]
    missing: dict[str, int]
    values: dict[str, dict[str, float]]


@dataclass(frozen=True)
class NonFinite:
    """NaN or infinite features of one view of one bag, counted where the view is present."""

    split: str
    bag: str
    view: str
    values: int


@dataclass(frozen=True)
class SourceReport:
    """What `inspect_source` found; `dataclasses.asdict` makes it JSON.

    Attributes:
        source, format, name, description: which data.
        bags, instances: split -> how many.
        instances_per_bag: split -> min, q25, median, q75, max, mean; empty for a split without bags.
        coords: whether instances have positions.
        views, tasks: in the source's order.
        columns: of the table of labels, what each was taken for and why.
        patients: split -> how many; None where nothing says whose the bags are.
        non_finite: features that are NaN or infinite.
        duplicates: groups of bags with the same features, as "split: bag".
        skipped: what of the source could not be used and was left out.
        problems: all that is wrong or suspicious, worst first, each one line with names in it.
        faults: those of them, the first, that a training does not go on with.
    """

    source: str
    format: str
    name: str
    description: str
    bags: dict[str, int]
    instances: dict[str, int]
    instances_per_bag: dict[str, dict[str, float]]
    coords: bool
    views: list[ViewReport]
    tasks: list[TaskReport]
    columns: list[ColumnUse]
    patients: dict[str, int] | None
    non_finite: list[NonFinite]
    duplicates: list[list[str]]
    skipped: list[str]
    problems: list[str]
    faults: list[str]

    @property
    def first_problem(self) -> str | None:
        return self.problems[0] if self.problems else None


@dataclass
class _Pass:
    """What one pass over all bags gathers."""

    missing: dict[str, list[int]]
    non_finite: list[NonFinite]
    duplicates: list[list[str]]
    empty: list[str]
    coords: bool


def inspect_source(
    source: str | PathLike[str] = "digits", *, format: str | None = None, seed: int = 0, **options: Any
) -> SourceReport:
    """Read every bag of a source once and report on it. Arguments as of `load_source`.

    Raises:
        DataError: the source cannot be read at all, as `load_source`.
    """
    splits = load_source(source, format=format, seed=seed, **options)
    return inspect_splits(splits, fspath(source), find_format(fspath(source), format).name)


def inspect_splits(splits: Splits, source: str = "", format: str = "") -> SourceReport:
    """The report on splits already loaded."""
    found = _read(splits)
    tasks = [_task_report(task, splits) for task in splits.tasks]
    instances = {split: int(dataset.sizes.sum()) for split, dataset in splits.items()}
    views = [
        ViewReport(
            view.name,
            view.width,
            {
                split: found.missing[split][column] / instances[split] if instances[split] else None
                for split in SPLITS
            },
        )
        for column, view in enumerate(splits.views)
    ]
    return SourceReport(
        source=source,
        format=format,
        name=splits.name,
        description=splits.description,
        bags={split: len(dataset) for split, dataset in splits.items()},
        instances=instances,
        instances_per_bag={split: _quantiles(dataset) for split, dataset in splits.items()},
        coords=found.coords,
        views=views,
        tasks=tasks,
        columns=list(splits.about.columns),
        patients=None if splits.about.patients is None else dict(splits.about.patients),
        non_finite=found.non_finite,
        duplicates=found.duplicates,
        skipped=list(splits.skipped),
        problems=list(_problems(splits, found, views, tasks)),
        faults=list(splits.about.faults),
    )


def _read(splits: Splits) -> _Pass:
    missing = {split: [0] * len(splits.views) for split in SPLITS}
    non_finite: list[NonFinite] = []
    empty: list[str] = []
    same: dict[bytes, list[str]] = {}
    with_coords = total = 0
    for split, dataset in splits.items():
        for index in range(len(dataset)):
            bag = dataset[index]
            total += 1
            with_coords += bag.coords is not None
            if len(bag) == 0:
                empty.append(f"{split}: {bag.name}")
                continue
            digest = hashlib.blake2b(digest_size=16)
            for column, view in enumerate(splits.views):
                present = _present(bag, view.name, column)
                missing[split][column] += len(bag) - int(present.sum())
                if view.name not in bag.views:
                    continue
                features = bag.views[view.name][present]
                wrong = int((~torch.isfinite(features)).sum())
                if wrong:
                    non_finite.append(NonFinite(split, bag.name, view.name, wrong))
                digest.update(present.numpy().tobytes())
                digest.update(features.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            same.setdefault(digest.digest(), []).append(f"{split}: {bag.name}")
    return _Pass(
        missing=missing,
        non_finite=non_finite,
        duplicates=[group for group in same.values() if len(group) > 1],
        empty=empty,
        coords=0 < with_coords == total,
    )


def _present(bag: Bag, view: str, column: int) -> torch.Tensor:
    if bag.mask is not None:
        return bag.mask[:, column]
    return torch.full((len(bag),), view in bag.views)


def _quantiles(dataset: BagDataset) -> dict[str, float]:
    sizes = dataset.sizes
    if not len(sizes):
        return {}
    quantiles = {name: float(np.quantile(sizes, share)) for name, share in QUANTILES.items()}
    return {**quantiles, "mean": float(sizes.mean())}


def _task_report(task: TaskSpec, splits: Splits) -> TaskReport:
    columns = {split: dataset.labels[task.name] for split, dataset in splits.items()}
    gone = {
        split: int(np.isnan(column.reshape(len(column), -1)).any(axis=1).sum()) if len(column) else 0
        for split, column in columns.items()
    }
    figures = {split: kind_of(task).summary(column) for split, column in columns.items()}
    return TaskReport(
        name=task.name,
        kind=task.kind,
        classes=list(task.class_names),
        positive=kind_of(task).positive(task),
        counts={split: kind_of(task).counts(task, column) for split, column in columns.items()},
        labelled={split: len(column) - gone[split] for split, column in columns.items()},
        missing=gone,
        values={split: found for split, found in figures.items() if found},
    )


def _problems(
    splits: Splits, found: _Pass, views: Sequence[ViewReport], tasks: Sequence[TaskReport]
) -> Iterator[str]:
    yield from splits.about.faults
    for line in splits.skipped:
        yield f"skipped: {line}"
    for item in found.non_finite:
        yield (
            f"{item.split}: bag {item.bag!r}: view {item.view!r}: {item.values} values are not finite; "
            "training would stop at this bag"
        )
    for split in SPLITS:
        if not len(splits[split]):
            yield f"{split}: no bag at all"
    for task, report in zip(splits.tasks, tasks, strict=True):
        yield from _task_problems(task, report, splits)
    for group in found.duplicates:
        where = {entry.partition(": ")[0] for entry in group}
        across = ", in more than one split" if len(where) > 1 else ""
        yield f"duplicate bags{across}: {', '.join(group)} have the same features"
    for view in views:
        for split, share in view.missing.items():
            if share == 1.0:
                yield f"{split}: view {view.name!r}: missing everywhere"
    for bag in found.empty:
        yield f"{bag}: a bag without instances"
    yield from splits.about.doubts


def _task_problems(task: TaskSpec, report: TaskReport, splits: Splits) -> Iterator[str]:
    columns = {split: splits[split].labels[task.name] for split in SPLITS}
    everywhere = np.concatenate(list(columns.values()))
    for split, column in columns.items():
        if not len(column):
            continue
        where = f"{split}: task {task.name!r}"
        if not report.labelled[split]:
            yield f"{where}: no label at all"
            continue
        problem = kind_of(task).problem(task, column, everywhere)
        if problem:
            yield f"{where}: {problem}"
