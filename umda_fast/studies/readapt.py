"""A trained model for new labels in seconds: its trunk as it is, new heads in closed form.

Source of the choice of the penalty by leave-one-out errors: Golub, Heath and Wahba, "Generalized cross-validation as a
method for choosing a good ridge parameter", Technometrics 1979, as scikit-learn's RidgeCV does it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from umda_fast import ops
from umda_fast.data import SPLITS, BagDataset, Splits, load_source
from umda_fast.data.adapt import adapt_dataset
from umda_fast.errors import DataError
from umda_fast.files import write_json
from umda_fast.model import UMDA, Mixture, TaskSpec
from umda_fast.model.readout import Readout
from umda_fast.runtime.config import DataConfig, as_dict, dump_config, make_config
from umda_fast.runtime.fabric import make_fabric
from umda_fast.runtime.provenance import stamped
from umda_fast.runtime.rundir import RunDirectory, save_model
from umda_fast.score.calibration import Calibration
from umda_fast.score.collect import calibrate, collect
from umda_fast.score.completion import complete_tasks
from umda_fast.score.evaluation import SplitResult, evaluate_dataset
from umda_fast.score.thresholds import choose_thresholds
from umda_fast.tasks import kind_of
from umda_fast.train.chosen import data_seed, tell, tell_excluded
from umda_fast.train.data import is_own, tell_missing_inputs
from umda_fast.train.loading import Run
from umda_fast.train.located import recorded_paths
from umda_fast.train.split_record import NEW, SEEN, TRUNK, SplitRecord, patients_of

__all__ = ["fit_head", "readapt"]

_PENALTIES = np.logspace(-2, 6, 17)


def fit_head(task: TaskSpec, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor, float]:
    """A linear head by ridge regression, the penalty chosen among 17 from 0.01 to 10^6 by leave-one-out errors.

    Features are standardised for it. Targets are -1 and 1 for every class or label, and standardised values for a
    regression, so that logits above 0 predict a label.

    Args:
        features: [B, F] of the bags that carry the label. target: their labels, [B] or, multilabel, [B, classes].

    Returns:
        weight [outputs, F], bias [outputs], float32, and the penalty.
    """
    x = features.double().numpy()
    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std == 0] = 1.0
    ridge = RidgeCV(_PENALTIES).fit((x - mean) / std, kind_of(task).linear_targets(task, target.double().numpy()))
    weight = np.atleast_2d(ridge.coef_) / std
    bias = np.atleast_1d(ridge.intercept_) - weight @ mean
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), float(ridge.alpha_)


class _Features(nn.Module):
    """A trunk whose logits, for every task alike, are its features."""

    def __init__(self, trunk: UMDA, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.trunk = trunk
        self.names = [task.name for task in tasks]

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=dict.fromkeys(self.names, Readout.features(self.trunk(**inputs))))


def _unseen(run: Run, source: str, loaded: Splits, data: DataConfig) -> Splits:
    """`loaded` without the bags in `val` and `test` that the trunk was trained or validated on; the run's own data
    divided as it was recorded, and bags that came since as they would be today, but those of patients that the trunk
    knows in `train`."""
    if run.record is None:
        tell(run, "has no splits.csv: whether bags of this data were trained on cannot be told")
        return loaded
    trunk = run.model.config
    whole = adapt_dataset(loaded.whole, trunk.views, loaded.tasks, trunk.metadata)
    own = is_own(run, source)
    found = run.record.match_bags(whole, data, own=own, wanted=SPLITS)
    today = {name: split for split, part in loaded.items() for name in part.names}
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    if own:
        changes = found.describe("divided as they would be today")
        if changes:
            tell(run, f"since it was trained, of its bags: {changes}")
        parts = {split: found.rows(split).tolist() for split in SPLITS}
    known = {bag.patient for bag in run.record.bags if bag.split in SEEN and bag.patient} if own else set()
    patients = patients_of(loaded)
    left_out = []
    for row, name in enumerate(whole.names):
        split = today.get(name)
        if split is None or (own and found.splits[row] != NEW):
            continue
        if split != "train" and found.splits[row] in SEEN:
            left_out.append(name)
        else:
            parts["train" if patients.get(name) in known else split].append(row)
    tell_excluded(run, left_out)
    return loaded.divided({split: np.array(rows, dtype=np.int64) for split, rows in parts.items()})


def _record(
    run: Run, parts: Mapping[str, BagDataset], patients: Mapping[str, str], data: DataConfig
) -> SplitRecord:
    """The bags that the heads are fitted to and tested on, and, as `trunk`, those that only the trunk knows."""
    record = SplitRecord.of(parts, data, patients=patients)
    known = {bag.content for bag in record.bags}
    trunk = [bag for bag in (run.record.bags if run.record else ()) if bag.split in SEEN and bag.content not in known]
    return SplitRecord((*record.bags, *(replace(bag, split=TRUNK) for bag in trunk)))


def readapt(
    run: Run,
    out: str | os.PathLike[str],
    *,
    source: str | None = None,
    datasets: Mapping[str, BagDataset] | None = None,
    format: str | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    backend: str = "auto",
) -> SplitResult | None:
    """Fit heads for the tasks of `source` (or of `datasets`) on the trunk of `run`, and leave a run directory that
    `evaluate`, `predict`, `explain` and `report` take like any other.

    The trunk is that of UMDA alone, without a linear model that was mixed in. Heads are fitted on the split `train`;
    their temperatures, which are multiplied into them, and thresholds, as the run's configuration says, on `val` if
    there is one. The run's own data is divided as the
    run recorded it; in other data bags that the trunk was trained or validated on are in neither `val` nor `test`.

    Args:
        out: the new run directory; must not hold a run.
        source: of the bags with the new labels; its views are the model's, or some of them.
        options: of the source.

    Returns:
        The result on the split `test` (`val` without one, None without either), also in its metrics.json.

    Raises:
        DataError: the data does not fit the model or holds no label, or the run is of another architecture.
    """
    whole = run.model.model if isinstance(run.model, Mixture) else run.model
    if not isinstance(whole, UMDA):
        raise DataError(f"{run.directory}: expected a model of the architecture umda, got {type(whole).__name__}")
    begin = time.monotonic()
    where = "datasets" if source is None else source
    settings = make_config(
        {
            **as_dict(run.config),
            "device": device,
            "data": {
                **as_dict(run.config)["data"],
                "source": where,
                "format": format,
                "options": dict(options or {}),
            },
        }
    )
    if datasets is None:
        if source is None:
            raise DataError("source: expected the data with the new labels, got none")
        loaded = load_source(source, format=format, seed=data_seed(settings), **dict(options or {}))
        loaded.check()
        datasets = _unseen(run, source, loaded, settings.data)
    if "train" not in datasets or not datasets["train"].tasks:
        raise DataError(f"{where}: expected a split 'train' with labels of at least one task")
    tasks = datasets["train"].tasks
    trunk = whole.config
    parts = {name: adapt_dataset(part, trunk.views, tasks, trunk.metadata) for name, part in datasets.items()}
    tell_missing_inputs(run, datasets["train"])
    directory = RunDirectory(out)
    directory.begin(resume=False)
    settings = replace(settings, data=replace(settings.data, paths=recorded_paths(settings.data, directory.path)))
    _record(run, parts, patients_of(datasets), settings.data).write(directory.splits)
    fabric = make_fabric(settings)
    penalties = {}
    calibration: Calibration | None = None
    with ops.prefer_backend(backend):
        fabric.to_device(whole)
        model = Readout(whole.eval(), tasks).eval()
        found = collect(_Features(model.trunk, tasks), parts["train"], fabric, settings.data)
        for task, head in zip(tasks, model.heads, strict=True):
            features, target = found.of(task)
            if len(target) < 2:
                raise DataError(f"{where}: task {task.name!r}: expected at least 2 labels to fit, got {len(target)}")
            weight, bias, penalties[task.name] = fit_head(task, features, target)
            head.load_state_dict({"weight": weight, "bias": bias})
        fabric.to_device(model)
        if len(parts.get("val", ())):
            calibration = calibrate(model, parts["val"], fabric, settings.data)
            for task, head in zip(tasks, model.heads, strict=True):
                temperature = calibration.temperatures.get(task.name, 1.0)
                head.load_state_dict({name: value / temperature for name, value in head.state_dict().items()})
            calibration = replace(calibration, temperatures=dict.fromkeys(calibration.temperatures, 1.0))
        complete_tasks(model, parts["train"], fabric, settings.data)
        choose_thresholds(model, parts, settings.train.thresholds, fabric, settings.data)
        split = next((name for name in ("test", "val") if len(parts.get(name, ()))), None)
        result = None
        if split is not None:
            measured = parts[split].with_tasks(model.config.tasks)
            result = evaluate_dataset(model, measured, fabric, settings.data)
    dump_config(settings, directory.config)
    save_model(model, directory.path)
    if calibration is not None:
        calibration.save(directory.calibration)
    report: dict[str, Any] = {"trunk": str(run.directory), "penalties": penalties, "seconds": time.monotonic() - begin}
    if result is not None:
        report |= {"data": {"split": split}, "tasks": result.tasks, "mean_score": result.mean_score}
    write_json(directory.metrics, stamped("metrics", report))
    return result
