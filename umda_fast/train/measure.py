"""The model of a run, measured on a split of its own data or of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umda_fast import ops
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec
from umda_fast.score.collect import Predictions
from umda_fast.score.evaluation import SplitResult, evaluate_dataset
from umda_fast.score.intervals import bootstrap_interval
from umda_fast.tasks import kind_of
from umda_fast.train.data import measured_split, model_data
from umda_fast.train.loading import Run

__all__ = ["LEVEL", "evaluate", "intervals", "patients_by_record"]

LEVEL = 0.95
"""Of all intervals of scores."""


def evaluate(
    run: Run,
    *,
    source: str | None = None,
    split: str | None = None,
    datasets: Mapping[str, BagDataset] | None = None,
    format: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    skip_bad: bool = False,
    progress: bool = True,
    samples: int = 0,
) -> SplitResult:
    """The model of a run on a split of its own data, of `source`, or of `datasets`.

    Args:
        split: train, val or test, as the run recorded its bags (splits.csv), or as other data says itself; `new`, bags
            that came since; `all`, every bag but those that the run was trained or validated on. None: the test split
            of the run's own data and of `datasets`, `all` of other data.
        samples: draws for the `intervals` of the result; 0: it has none.

    Raises:
        DataError: there is no such split, or the data does not fit the model; members of an ensemble were trained on
            different data or splits.
    """
    if datasets is None:
        split = measured_split(run, source, split)
    dataset, fabric = model_data(
        run,
        source=source,
        datasets=datasets,
        split=split or "test",
        format=format,
        device=device,
        skip_bad=skip_bad,
        measured=True,
    )
    if len(dataset) == 0:
        raise DataError(f"{source or run.config.data.source}: split {split!r} holds no bags to evaluate on")
    model = fabric.to_device(run.model)
    with ops.prefer_backend(backend):
        result = evaluate_dataset(model, dataset, fabric, run.config.data, progress=progress, keep=samples > 0)
    if result.predictions is not None:
        patients = patients_by_record(run, dataset.names)
        result.intervals = intervals(dataset.tasks, result.predictions, patients, samples)
    return result


def patients_by_record(run: Run, names: Sequence[str]) -> list[str] | None:
    """Whose bags these are, by the run's splits.csv; None where it does not know of patients."""
    known = {} if run.record is None else {bag.name: bag.patient for bag in run.record.bags}
    if not any(known.get(name) for name in names):
        return None
    return [f"patient {known[name]}" if known.get(name) else f"bag {name}" for name in names]


def intervals(
    tasks: Sequence[TaskSpec], found: Predictions, patients: Sequence[str] | None, samples: int
) -> dict[str, dict[str, Any]]:
    """Of each task's primary `metric`, `low` and `high`, NaN where it is not defined, at `level`; over how many `units`
    and of what, `unit`: bags, or the patients whose bags they are.

    Args:
        patients: of every bag, as of `patients_by_record`.
        samples: draws of the bootstrap.
    """
    result = {}
    for task in tasks:
        logits, target = found.of(task)
        kept = found.masks[task.name].nonzero()[:, 0].tolist()
        groups = None if patients is None else [patients[row] for row in kept]
        low, high = bootstrap_interval(task, logits, target, groups=groups, level=LEVEL, samples=samples)
        units = len(target) if groups is None else len({*groups})
        ends = {"metric": kind_of(task).primary, "level": LEVEL, "low": low, "high": high}
        result[task.name] = {**ends, "unit": "bags" if groups is None else "patients", "units": units}
    return result
