"""The bags of a run and how they are split: those that it is trained on, and, for a run that is read back, those that
its model may be measured on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_fabric import Fabric

from umda_fast.data import BagDataset, Splits, concat, find_format, load_folds, load_source
from umda_fast.data.adapt import adapt_dataset
from umda_fast.errors import DataError
from umda_fast.runtime.config import RunConfig, as_dict, make_config
from umda_fast.runtime.fabric import make_fabric
from umda_fast.train.loading import Run

__all__ = [
    "check_same_split",
    "data_seed",
    "load_configured_folds",
    "load_data",
    "model_data",
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
    return splits


def training_data(
    config: RunConfig, datasets: Mapping[str, BagDataset] | None = None
) -> tuple[RunConfig, Mapping[str, BagDataset]]:
    """What a run trains on, `datasets` or else the configured source, and the configuration that gives the same again:
    with the options that the source had to choose by itself.

    Raises:
        DataError: from the source; there is no split `train`, or it has no labels.
    """
    splits = load_data(config) if datasets is None else datasets
    if isinstance(splits, Splits):
        splits.check()
    if isinstance(splits, Splits) and splits.fixed:
        options = {**config.data.options, **splits.fixed}
        config = replace(config, data=replace(config.data, options=options))
    if "train" not in splits:
        raise DataError(f"datasets: expected a split 'train', got {', '.join(splits) or 'none'}")
    if not splits["train"].tasks:
        raise DataError(
            f"{splits['train'].name}: expected labels of at least one task, got none; a directory of bags has "
            "them in labels.csv, a column for each task"
        )
    return config, splits


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
        yield splits


def data_seed(config: RunConfig) -> int:
    """The seed of splits and generated bags."""
    return config.seed if config.data.seed is None else config.data.seed


def tell_skipped(lines: Sequence[str]) -> None:
    """List on standard error what of a source was left out, which is done only where it was asked for."""
    for line in lines:
        print(f"skipped: {line}", file=sys.stderr)


def check_same_split(run: Run) -> None:
    """Bags that one member is measured on must not be among those that another was trained on.

    Raises:
        DataError: the members' data differ, or how it is split.
    """

    def split(config: RunConfig) -> dict[str, Any]:
        data = config.data
        return {"source": data.source, "options": dict(data.options), "format": data.format, "seed": data_seed(config)}

    expected = split(run.config)
    for member in run.members:
        for name, found in split(member.config).items():
            if found != expected[name]:
                raise DataError(
                    f"{member.directory}: data.{name}: expected {expected[name]!r} as in {run.directory}, for one "
                    f"split of the data (train every member with the same --set data.seed=N), got {found!r}"
                )


def model_data(
    run: Run,
    *,
    source: str | None,
    datasets: Mapping[str, BagDataset] | None,
    split: str | None,
    format: str | None,
    device: str,
    skip_bad: bool = False,
) -> tuple[BagDataset, Fabric]:
    """Bags as the run's model takes them, and the device to run it on: one split, or with `split=None` all of
    them. `skip_bad` leaves out what is bad in the source and lists it on standard error.

    Raises:
        DataError: there is no such split, or the data does not fit the model.
    """
    data = run.config.data
    model = run.model.config
    if datasets is None:
        where = data.source if source is None else source
        kind = find_format(where, format if source is not None else data.format)
        understood = kind.options()
        other = source is not None and source != data.source
        foreign = kind.local if other else ()
        options = {name: value for name, value in data.options.items() if name in understood and name not in foreign}
        if skip_bad:
            options["skip_bad"] = True
        if "kinds" in understood:
            # What the model was trained on decides what a label means: a file with two of ten classes is not
            # binary.
            options["kinds"] = model.tasks
        loaded = load_source(where, format=kind.name, seed=data_seed(run.config), **options)
        tell_skipped(loaded.skipped)
        splits: Mapping[str, BagDataset] = loaded
    else:
        where, splits = "datasets", datasets
    if split is not None and split not in splits:
        raise DataError(f"{where}: expected a split among {', '.join(splits)}, got {split!r}")
    if split is not None:
        chosen = [splits[split]]
    elif isinstance(splits, Splits):
        chosen = [splits.whole]
    else:
        chosen = list(splits.values())
    metadata = getattr(model, "metadata", ())
    parts = [adapt_dataset(part, model.views, model.tasks, metadata) for part in chosen]
    fabric = make_fabric(make_config({**as_dict(run.config), "device": device}))
    return (parts[0] if len(parts) == 1 else concat(parts, where)), fabric
