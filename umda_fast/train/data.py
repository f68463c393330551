"""The bags of a run and how they are split: those that it is trained on, and, for a run that is read back, those that
its model may be measured on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lightning_fabric import Fabric

from umda_fast.data import SPLITS, BagDataset, SourceFormat, Splits, concat, find_format, load_folds, load_source
from umda_fast.data.adapt import adapt_dataset
from umda_fast.data.labels import UnneededLabels
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec
from umda_fast.runtime.config import DataConfig, RunConfig, as_dict, make_config
from umda_fast.runtime.fabric import make_fabric
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.train.chosen import ALL, check_same_split, chosen_rows, data_seed, tell
from umda_fast.train.loading import Run
from umda_fast.train.located import located, recorded_paths, same_place
from umda_fast.train.recorded import check_recorded, recorded_splits

__all__ = [
    "check_same_split",
    "data_seed",
    "is_own",
    "load_configured_folds",
    "load_data",
    "measured_split",
    "model_data",
    "tell_missing_inputs",
    "tell_skipped",
    "training_data",
]


def load_data(config: RunConfig) -> Splits:
    """The splits of the configured source.

    Raises:
        DataError: from the source.
    """
    data = config.data
    splits = load_source(data.source, format=data.format, seed=data_seed(config), **data.options)
    tell_skipped(splits.skipped)
    _tell_guesses(splits)
    return splits


def training_data(
    config: RunConfig,
    datasets: Mapping[str, BagDataset] | None = None,
    run: RunDirectory | None = None,
    *,
    resume: bool = False,
) -> tuple[RunConfig, Mapping[str, BagDataset]]:
    """What a run trains on, `datasets` or else the configured source, and the configuration that gives the same again:
    with the options that the source had to choose by itself, and where its files are. With `resume` the bags are those
    that the run recorded.

    Raises:
        DataError: from the source; there is no split `train`, or it has no labels; bags of a resumed run are gone.
    """
    again = run if resume else None
    if datasets is not None:
        splits = datasets
        if again is not None:
            check_recorded(again, datasets)
    else:
        data = config.data if again is None else _data_again(config.data, again)
        splits = load_data(replace(config, data=data))
        if again is not None:
            splits = recorded_splits(again, splits, data)
    if isinstance(splits, Splits):
        splits.check()
    if isinstance(splits, Splits) and splits.fixed:
        options = {**config.data.options, **splits.fixed}
        config = replace(config, data=replace(config.data, options=options))
    if run is not None and again is None:
        config = replace(config, data=replace(config.data, paths=recorded_paths(config.data, run.path)))
    if "train" not in splits:
        raise DataError(f"datasets: expected a split 'train', got {', '.join(splits) or 'none'}")
    if not splits["train"].tasks:
        raise DataError(
            f"{splits['train'].name}: expected labels of at least one task, got none; a directory of bags has "
            "them in labels.csv, a column for each task"
        )
    return config, splits


def _data_again(data: DataConfig, run: RunDirectory) -> DataConfig:
    """The data of a run that is gone on with, where it is now, with the tasks that it began with."""
    data = located(data, run.path, "it is needed to go on")
    kind, options, about = find_format(data.source, data.format), dict(data.options), run.path / "config.json"
    if run.splits.is_file():
        options = _by_record(options, kind)
    if about.is_file() and "kinds" in kind.options():  # there are weights already
        tasks = json.loads(about.read_text(encoding="utf-8"))["tasks"]
        options["kinds"] = tuple(TaskSpec(**{**task, "thresholds": None}) for task in tasks)
    return replace(data, options=options)


def _by_record(options: Mapping[str, Any], kind: SourceFormat) -> dict[str, Any]:
    """Options of a run's own data where its record says how it is split and which bags are gone."""
    plain = {name: value for name, value in options.items() if name not in ("splits", "fold")}
    return {"partial": True, **plain} if "partial" in kind.options() else plain


def load_configured_folds(config: RunConfig, folds: int, repeats: int = 1) -> Iterator[Splits]:
    """The configured source, one `Splits` for every fold of every repeat.

    Raises:
        DataError: from the source, or too many folds.
    """
    data = config.data
    all_folds = load_folds(
        data.source, folds=folds, repeats=repeats, seed=data_seed(config), format=data.format, **data.options
    )
    for number, splits in enumerate(all_folds):
        splits.check()
        if number == 0:
            tell_skipped(splits["train"].skipped)
            _tell_guesses(splits)
        yield splits


def _tell_guesses(splits: Splits) -> None:
    """List on standard error what of a source had to be guessed."""
    for line in [*splits.about.notes, *splits.about.doubts]:
        print(f"note: {line}", file=sys.stderr)


def tell_skipped(lines: Sequence[str]) -> None:
    """List on standard error what of a source was left out, which is done only where it was asked for."""
    for line in lines:
        print(f"skipped: {line}", file=sys.stderr)


def is_own(run: Run, source: str | None) -> bool:
    """Whether `source` (None: its own) is the data that the run was trained on, as it is today."""
    return source is None or same_place(run.config.data, run.directory, source)


def measured_split(run: Run, source: str | None, split: str | None) -> str:
    """The split that is measured where none is asked for: test of the run's own data, all of other data."""
    if split is not None:
        return split
    return "test" if is_own(run, source) else ALL


def model_data(
    run: Run,
    *,
    source: str | None,
    datasets: Mapping[str, BagDataset] | None,
    split: str | None,
    format: str | None,
    device: str,
    skip_bad: bool = False,
    measured: bool = False,
    labels: bool = True,
) -> tuple[BagDataset, Fabric]:
    """Bags as the run's model takes them, and the device to run it on: one split, or with `split=None` all of
    them. `skip_bad` leaves out what is bad in the source and lists it on standard error. `measured`: a figure is made
    of them, so that bags that decided on the weights are left out of `all` (`umda_fast.train.chosen`). Without `labels`
    those that do not fit the model are missing, which is said, as is a view that it was trained with and that is not
    there.

    Raises:
        DataError: there is no such split, the data does not fit the model, or there is nothing to measure by.
    """
    model = run.model.config
    metadata = getattr(model, "metadata", ())
    tasks = model.tasks if labels else UnneededLabels(model.tasks)

    def adapted(part: BagDataset) -> BagDataset:
        tell_missing_inputs(run, part)
        found = adapt_dataset(part, model.views, tasks, metadata)
        if isinstance(tasks, UnneededLabels) and tasks.ignored:
            tell(run, f"labels ignored, which are not needed: {'; '.join(tasks.ignored)}")
        return found

    fabric = make_fabric(make_config({**as_dict(run.config), "device": device}))
    if datasets is not None:
        if split not in (None, ALL, *datasets):
            raise DataError(f"datasets: expected a split among {', '.join(datasets)}, got {split!r}")
        parts = [adapted(part) for name, part in datasets.items() if split in (None, ALL, name)]
        whole = parts[0] if len(parts) == 1 else concat(parts, "datasets")
        return _labelled(whole, measured), fabric
    if split in SPLITS:
        check_same_split(run, split)
    own = is_own(run, source)
    loaded = _load_again(run, source, own, format, tasks, skip_bad)
    whole = adapted(loaded.whole)
    if split not in (None, ALL) or measured:
        whole = whole.subset(chosen_rows(run, loaded, whole, split, own=own, measured=measured))
    return _labelled(whole, measured), fabric


def _labelled(dataset: BagDataset, measured: bool) -> BagDataset:
    """`dataset`, which, if it has bags and is measured, has labels."""
    if measured and len(dataset) and all(np.isnan(column).all() for column in dataset.labels.values()):
        tasks = ", ".join(task.name for task in dataset.tasks)
        raise DataError(f"{dataset.name}: expected labels to measure by, got none for {tasks}")
    return dataset


def tell_missing_inputs(run: Run, part: BagDataset) -> None:
    """Warn of views and metadata that the run was trained with and that `part` does not have at all."""
    model = run.model.config
    used = getattr(model, "view", None)  # of a baseline that looks at one view
    views = [view.name for view in model.views if used in (None, view.name)]
    known = () if part.metadata is None else part.metadata.names
    missing = {
        "view": [name for name in views if name not in {view.name for view in part.views}],
        "metadata": [spec.name for spec in getattr(model, "metadata", ()) if spec.name not in known],
    }
    for what, names in missing.items():
        if names:
            lack = f"{part.name} has no {what} {', '.join(names)}"
            tell(run, f"warning: {lack}, which it was trained with: it does without")


def _load_again(
    run: Run, source: str | None, own: bool, format: str | None, tasks: Sequence[TaskSpec], skip_bad: bool
) -> Splits:
    """The run's own data or another source, read as the run read its own."""
    data = located(run.config.data, run.directory, options_only=not own)
    where = source if source is not None and not own else data.source
    kind = find_format(where, format if source is not None else data.format)
    understood = kind.options()
    foreign = () if own else kind.local
    options = {name: value for name, value in data.options.items() if name in understood and name not in foreign}
    if own and run.record is not None:
        options = _by_record(options, kind)
    if isinstance(tasks, UnneededLabels) and "partial" in understood:  # whatever became of its table of labels
        options = {"partial": True, **{name: options[name] for name in options if name not in ("tasks", "ignore")}}
    options |= run.options
    if skip_bad:
        options["skip_bad"] = True
    if "kinds" in understood:
        # What the model was trained on decides what a label means: a file with two of ten classes is not
        # binary.
        options["kinds"] = tasks
    loaded = load_source(where, format=kind.name, seed=data_seed(run.config), **options)
    tell_skipped(loaded.skipped)
    return loaded
