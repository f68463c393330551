"""The model of a run, measured on a split of its own data or of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from umda_fast import ops
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec
from umda_fast.score.collect import Predictions
from umda_fast.score.evaluation import SplitResult, evaluate_dataset
from umda_fast.score.intervals import bootstrap_intervals
from umda_fast.score.metrics import TaskMetrics, mean_score
from umda_fast.score.patients import Patients, join_predictions
from umda_fast.tasks import kind_of
from umda_fast.train.data import is_own, measured_split, model_data
from umda_fast.train.loading import Run

__all__ = ["LEVEL", "evaluate", "intervals", "patients_of_bags"]

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
    by: str = "bag",
) -> SplitResult:
    """The model of a run on a split of its own data, of `source`, or of `datasets`.

    Args:
        split: train, val or test, as the run recorded its bags (splits.csv), or as other data says itself; `new`, bags
            that came since; `all`, every bag but those that the run was trained or validated on. None: the test split
            of the run's own data and of `datasets`, `all` of other data.
        samples: draws for the `intervals` of the result; 0: it has none.
        by: `bag` or `patient`, what the metrics and predictions are of: by patient they are of the mean prediction of
            his bags (`umda_fast.score.patients`). Losses stay those of bags.

    Raises:
        DataError: there is no such split, or the data does not fit the model; by patient, nothing says whose the bags
        are, or bags of one have different labels; members of an ensemble were trained on
            different data or splits.
    """
    if by not in ("bag", "patient"):
        raise DataError(f"by: expected bag or patient, got {by!r}")
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
        keep = samples > 0 or by == "patient"
        result = evaluate_dataset(model, dataset, fabric, run.config.data, progress=progress, keep=keep)
    if result.predictions is not None:
        own = datasets is not None or is_own(run, source)
        groups = patients_of_bags(run, dataset, own=own)
        if by == "patient":
            patients = Patients.of(dataset.name, dataset.names, groups)
            result = _by_patient(result, dataset, patients)
            groups = [str(number) for number in range(len(patients.names))]
        assert result.predictions is not None
        if samples:
            result.intervals = intervals(dataset.tasks, result.predictions, groups, samples)
    return result


def _by_patient(result: SplitResult, dataset: BagDataset, patients: Patients) -> SplitResult:
    """`result`, which has predictions, with those of patients and their metrics."""
    assert result.predictions is not None
    tasks = dataset.tasks
    found = join_predictions(dataset.name, tasks, result.predictions, patients, dataset.sizes.tolist())
    metrics = TaskMetrics(tasks)
    metrics.update(found.logits, found.labels, found.masks)
    values = metrics.compute()
    score = mean_score(tasks, values)
    return replace(result, tasks=values, mean_score=score, predictions=found, patients=len(patients.names))


def patients_of_bags(run: Run, dataset: BagDataset, *, own: bool) -> list[str] | None:
    """Whose bags these are, as the data says or else, of the run's `own`, its splits.csv; None where neither knows."""
    if dataset.groups is not None or not own:
        return dataset.groups
    names = dataset.names
    known = {} if run.record is None else {bag.name: bag.patient for bag in run.record.bags}
    if not any(known.get(name) for name in names):
        return None
    return [f"patient {known[name]}" if known.get(name) else f"slide {name}" for name in names]


def intervals(
    tasks: Sequence[TaskSpec], found: Predictions, patients: Sequence[str] | None, samples: int
) -> dict[str, dict[str, Any]]:
    """Of each task's primary `metric`, `low` and `high`, NaN where it is not defined, at `level`; over how many `units`
    and of what, `unit`: bags, or the patients whose bags they are; and `others`, `low` and `high` of its other metrics.

    Args:
        patients: of every bag, as of `patients_of_bags`.
        samples: draws of the bootstrap.
    """
    result = {}
    for task in tasks:
        logits, target = found.of(task)
        kept = found.masks[task.name].nonzero()[:, 0].tolist()
        groups = None if patients is None else [patients[row] for row in kept]
        each = bootstrap_intervals(task, logits, target, groups=groups, level=LEVEL, samples=samples)
        primary = kind_of(task).primary
        low, high = each.pop(primary, (math.nan, math.nan))
        units = len(target) if groups is None else len({*groups})
        ends: dict[str, Any] = {"metric": primary, "level": LEVEL, "low": low, "high": high}
        ends |= {"unit": "bags" if groups is None else "patients", "units": units}
        ends["others"] = {name: {"low": low, "high": high} for name, (low, high) in each.items()}
        result[task.name] = ends
    return result
