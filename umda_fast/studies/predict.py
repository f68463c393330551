"""Predictions for bags: a CSV with a line for each, and, if asked, an HDF5 with every instance's
attention.
"""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from umda_fast import ops
from umda_fast.data import BagBatch, BagDataset
from umda_fast.errors import DataError
from umda_fast.extras import require
from umda_fast.files import atomic_file
from umda_fast.model import Mixture, TaskSpec, decode
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.score.calibration import Calibration, confidence
from umda_fast.score.inference import outputs_in_order
from umda_fast.score.patients import Patients, mean_of_bags
from umda_fast.tasks import kind_of
from umda_fast.train.chosen import tell
from umda_fast.train.data import is_own, model_data
from umda_fast.train.loading import Run
from umda_fast.train.measure import patients_of_bags

__all__ = ["PredictionTable", "predict", "predict_batches"]

NO_INSTANCES = "no instances"


@dataclass(frozen=True)
class PredictionTable:
    """predictions.csv, batch by batch.

    The last two columns are there always: `refer`, tasks that a human should decide, and `reason`. A bag without
    instances says nothing about its label: its predictions are blank, and it is referred whatever `refer_below` is.

    Attributes:
        tasks: that are predicted.
        calibration: adds confidences and ends of intervals; None adds nothing.
        refer_below: with a calibration, the confidence below which a task is referred.
    """

    tasks: Sequence[TaskSpec]
    calibration: Calibration | None = None
    refer_below: float = 0.0

    def header(self) -> list[str]:
        """Names of the columns."""
        header = ["bag", *(column for task in self.tasks for column in kind_of(task).columns(task))]
        for task in [] if self.calibration is None else self.tasks:
            if kind_of(task).decides and kind_of(task).calibration == "temperature":
                header.append(f"{task.name}_confidence")
            elif self._half_width(task) is not None:
                header += [f"{task.name}_low", f"{task.name}_high"]
        return [*header, "refer", "reason"]

    def lines(self, names: Sequence[str], sizes: Sequence[int], logits: Mapping[str, Tensor]) -> list[list[str]]:
        """Lines for the bags of a batch, which have so many instances."""
        width = len(self.header()) - 3
        every = ";".join(task.name for task in self.tasks)
        host = {name: value.float().cpu() for name, value in logits.items()}
        predicted = self._predictions(host)
        referred: list[list[str]] = [[] for _ in names]
        if self.calibration is not None:
            for line, more in zip(predicted, self._certainties(host, self.calibration, referred), strict=True):
                line += more
        return [
            [name, *cells, ";".join(tasks), f"confidence below {self.refer_below:g}" if tasks else ""]
            if size
            else [name, *[""] * width, every, NO_INSTANCES]
            for name, size, cells, tasks in zip(names, sizes, predicted, referred, strict=True)
        ]

    def _half_width(self, task: TaskSpec) -> float | None:
        return None if self.calibration is None else self.calibration.half_widths.get(task.name)

    def _predictions(self, logits: Mapping[str, Tensor]) -> list[list[str]]:
        columns = [kind_of(task).cells(task, decode(task, logits[task.name])) for task in self.tasks]
        return [[cell for cells in row for cell in cells] for row in zip(*columns, strict=True)]

    def _certainties(
        self, logits: Mapping[str, Tensor], calibration: Calibration, referred: list[list[str]]
    ) -> list[list[str]]:
        """Cells of confidences and intervals; tasks that are not sure are added to `referred`, bag by bag."""
        calibrated = calibration.apply(logits)
        lines: list[list[str]] = [[] for _ in referred]
        for task in self.tasks:
            half = self._half_width(task)
            if kind_of(task).decides and kind_of(task).calibration == "temperature":
                sure = confidence(task, calibrated[task.name]).tolist()
                for line, tasks, value in zip(lines, referred, sure, strict=True):
                    line.append(f"{value:.6g}")
                    tasks += [task.name] * (value < self.refer_below)
            elif half is not None:
                for line, value in zip(lines, decode(task, calibrated[task.name])[:, 0].tolist(), strict=True):
                    line += [f"{value - half:.6g}", f"{value + half:.6g}"]
        return lines


@torch.no_grad()
def predict_batches(
    run: Run, dataset: BagDataset, fabric: Any, *, progress: bool = False, title: str = "predict"
) -> Iterator[tuple[BagBatch, Any]]:
    """The batch and the model's output for all bags of `dataset`, which has the model's views and tasks, in
    its order.
    """
    model = fabric.to_device(run.model).eval()
    for _, batch, out in outputs_in_order(model, dataset, fabric, run.config.data, title=title, progress=progress):
        yield batch, out


def predict(
    run: Run,
    *,
    source: str | None = None,
    datasets: Mapping[str, BagDataset] | None = None,
    out: str | os.PathLike[str],
    attention: str | os.PathLike[str] | None = None,
    split: str | None = None,
    format: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    refer_below: float | None = None,
    times: Sequence[float] | None = None,
    skip_bad: bool = False,
    progress: bool = True,
    by: str = "bag",
) -> int:
    """Predict for every bag of `source` (or of `datasets`, or of the run's own data), all splits unless `split` names
    one: as the run recorded it, see docs/data.md. Labels are not needed; which of them do not fit the model is said.

    Several runs (`load_ensemble`) predict the mean of what they predict.

    The CSV holds the bag's name and, for each task, the probabilities, each in a column with the class it is of (for a
    binary task one, of the positive class), and the class predicted, classes joined by `;` for a multilabel task; for a
    regression the value in original units; for survival the risk (the mean probability, over the cuts, that the event
    has come by then) and the probability to live longer than each of `times`, or else of the quartiles of the training
    bags' event times. Its last columns are `refer`, tasks joined by `;` that a human should decide, and `reason`; a bag
    without instances has no predictions and is always referred.

    The HDF5 holds a group for each bag, named as the bag with `/` written as `%2F` and its plain name in the attribute
    `name`: `attention` [n, T], `view_weights` [n, V] (models with several views) and `coords` [n, 2] if the data has
    them; of a bag of several slides also `slide` [n], which of its attribute `names` each instance is of; the file's
    attributes `tasks` and `views` name the columns. Where the data knows, the attributes of `coords`
    say what it means: `unit` (um or px), `patch_size` in that unit, `pixel_size` in micrometres per level-0 pixel.

    With `refer_below`, a number between 0 and 1, the CSV further holds each task's calibrated confidence (see
    `calibration.confidence`) and the ends of a regression's interval, and `refer` names the tasks whose confidence is
    below that number. This needs the calibration.json that training writes when it has a validation split.

    By patient a line is the mean prediction of a patient's bags (`umda_fast.score.patients`), the first columns are
    `patient` and `bags`, whose names are joined by `;`, and a bag of which nobody knows whose it is stands alone. The
    HDF5 stays by bag.

    Returns:
        The number of lines, bags or patients.

    Raises:
        DataError: the data cannot be read or does not fit the model; `refer_below` or `times` out of range, or no
        calibration; by patient, nothing says whose the bags are, or `refer_below`, whose calibration is of bags.
    """
    tasks: Sequence[TaskSpec] = run.model.config.tasks
    if times is not None:
        tasks = _at_times(tasks, times)
    if by not in ("bag", "patient"):
        raise DataError(f"by: expected bag or patient, got {by!r}")
    if by == "patient" and refer_below is not None:
        raise DataError("refer_below: expected predictions by bag, which the run's calibration is of, got by patient")
    calibration = None
    if refer_below is not None:
        if not 0.0 <= refer_below <= 1.0:
            raise DataError(f"refer_below: expected a number between 0 and 1, got {refer_below}")
        if run.members:
            raise DataError(f"refer_below: expected one run, whose calibration is known, got {len(run.members)}")
        calibration = Calibration.load(RunDirectory(run.directory).calibration)
        for line in calibration.explained():
            print(line, file=sys.stderr)
    dataset, fabric = model_data(
        run,
        source=source,
        datasets=datasets,
        split=split,
        format=format,
        device=device,
        skip_bad=skip_bad,
        labels=False,
    )
    patients = None
    if by == "patient":
        groups = patients_of_bags(run, dataset, own=datasets is not None or is_own(run, source))
        patients = Patients.of(dataset.name, dataset.names, groups)
    with ExitStack() as stack:
        stack.enter_context(ops.prefer_backend(backend))
        table = stack.enter_context(atomic_file(out))
        text = io.TextIOWrapper(table, encoding="utf-8", newline="", write_through=True)
        stack.callback(text.detach)
        writer = csv.writer(text, lineterminator="\n")
        predictions = PredictionTable(tasks, calibration, 0.0 if refer_below is None else refer_below)
        writer.writerow([*(["bag"] if patients is None else ["patient", "bags"]), *predictions.header()[1:]])
        logits: list[dict[str, Tensor]] = []
        store = None
        if attention is not None:
            store = stack.enter_context(_attention_file(attention, run))
            for member in run.each:
                tell(member, mixed_note(member))
        empty = 0
        for batch, result in predict_batches(run, dataset, fabric, progress=progress):
            sizes = batch.ptr.diff().tolist()
            if patients is None:
                writer.writerows(predictions.lines(batch.names, sizes, result.logits))
            else:
                logits.append({name: value.float().cpu() for name, value in result.logits.items()})
            empty += sizes.count(0)
            if store is not None:
                _write_attention(store, batch, result)
        if store is not None:
            _write_positions(store, dataset)
        if patients is not None:
            writer.writerows(_lines_of_patients(predictions, patients, dataset, logits))
    if empty:
        print(f"{empty} of {len(dataset)} bags have no instances: not predicted, but referred", file=sys.stderr)
    return len(dataset) if patients is None else len(patients.names)


def _lines_of_patients(
    table: PredictionTable, patients: Patients, dataset: BagDataset, logits: Sequence[Mapping[str, Tensor]]
) -> Iterator[list[str]]:
    sizes, names = dataset.sizes, dataset.names
    joined = {
        task.name: mean_of_bags(task, torch.cat([part[task.name] for part in logits]), patients, sizes.tolist())
        for task in (table.tasks if logits else ())
    }
    totals = [int(sizes[members].sum()) for members in patients.members]
    for line, members in zip(table.lines(patients.names, totals, joined), patients.members, strict=True):
        yield [line[0], ";".join(names[row] for row in members.tolist()), *line[1:]]


def _at_times(tasks: Sequence[TaskSpec], times: Sequence[float]) -> tuple[TaskSpec, ...]:
    """The tasks, those of survival with the times that are shown."""
    timed = [task for task in tasks if kind_of(task).timed]
    if not timed:
        raise DataError("times: expected a model with a task of kind survival, got none")
    for task in timed:
        last = max(task.cuts or (0.0,))
        if not times or not all(0.0 < time <= last for time in times):
            expected = f"above 0 and at most {last:g}, the last event of {task.name} in training"
            got = ", ".join(f"{time:g}" for time in times) or "none"
            raise DataError(f"times: expected times {expected}, got {got}")
    shown = tuple(sorted({float(time) for time in times}))
    return tuple(replace(task, times=shown) if kind_of(task).timed else task for task in tasks)


def mixed_note(run: Run) -> str:
    """What has to be known of attention where other models are mixed in; "" where none is."""
    if not isinstance(run.model, Mixture) or not run.model.shares:
        return ""
    shares = ", ".join(f"{task} {share:.0%}" for task, share in run.model.shares.items())
    names = " and ".join(run.model.members)
    return f"attention is that of the trained model alone; what is mixed in ({names}) has a share in: {shares}"


@contextmanager
def _attention_file(path: str | os.PathLike[str], run: Run) -> Iterator[Any]:
    require("an attention file", "h5py")
    import h5py

    with atomic_file(path) as stream, h5py.File(stream, "w") as store:
        store.attrs["tasks"] = [task.name for task in run.model.config.tasks]
        store.attrs["views"] = [view.name for view in run.model.config.views]
        yield store


def _group_name(bag: str) -> str:
    return quote(bag, safe=" !#$&'()*+,:;=?@[]~")


def _write_positions(store: Any, dataset: BagDataset) -> None:
    positions = dataset.positions
    for row, name in enumerate(dataset.names):
        group = store[_group_name(name)]
        if dataset.slides is not None:
            sizes = dataset.slides.sizes(row)
            slide = group.create_dataset("slide", data=np.repeat(np.arange(len(sizes)), sizes))
            slide.attrs["names"] = dataset.slides.names(row)
        if positions is None:
            continue
        attributes = group["coords"].attrs
        attributes["unit"] = positions.unit
        for key, value in (("patch_size", positions.patch_size[row]), ("pixel_size", positions.pixel_size[row])):
            if not math.isnan(value):
                attributes[key] = value


def _write_attention(store: Any, batch: BagBatch, result: Any) -> None:
    attention = result.attention.float().cpu().numpy()
    weights = getattr(result, "view_weights", None)
    weights = None if weights is None else weights.float().cpu().numpy()
    coords = None if batch.coords is None else batch.coords.cpu().numpy()
    offsets = batch.ptr.tolist()
    for index, name in enumerate(batch.names):
        part = slice(offsets[index], offsets[index + 1])
        key = _group_name(name)
        if key in (".", ""):
            raise DataError(f"bag {name!r}: cannot be the name of a group in an HDF5 file")
        group = store.create_group(key)
        group.attrs["name"] = name
        group.create_dataset("attention", data=attention[part])
        if weights is not None:
            group.create_dataset("view_weights", data=weights[part])
        if coords is not None:
            group.create_dataset("coords", data=coords[part])
