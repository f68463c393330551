"""What the runs of a cross-validation predict for the bags that they are tested on: in each run's directory, then of
all together, and the metrics of all together."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umda_fast import ops
from umda_fast.data import BagDataset
from umda_fast.files import write_json, write_text
from umda_fast.model import TaskSpec
from umda_fast.runtime.config import RunConfig
from umda_fast.runtime.fabric import make_fabric
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.score.collect import Predictions, collect
from umda_fast.score.metrics import TaskMetrics, mean_score
from umda_fast.studies.predict import PredictionTable
from umda_fast.tasks import kind_of
from umda_fast.train.loading import load_run

__all__ = ["FILE", "FoldOutputs", "fold_outputs", "pooled_metrics", "write_out_of_fold"]

FILE = "test_outputs.json"
"""In a run's directory."""


@dataclass(frozen=True)
class FoldOutputs:
    """What one run's model gives for its test bags.

    Attributes:
        tasks: its own, with what its training labels fixed of them.
        names, sizes: of the bags.
        found: logits and labels.
    """

    tasks: tuple[TaskSpec, ...]
    names: list[str]
    sizes: list[int]
    found: Predictions

    def write(self, path: Path) -> None:
        """As JSON; numbers of float32 come back as they were."""
        found = {
            name: {task: value.tolist() for task, value in part.items()} for name, part in vars(self.found).items()
        }
        write_json(
            path, {"tasks": [asdict(task) for task in self.tasks], "bags": self.names, "sizes": self.sizes, **found}
        )

    @classmethod
    def read(cls, path: Path) -> FoldOutputs:
        """What `write` wrote."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        tasks = tuple(TaskSpec(**task) for task in plain["tasks"])

        def tensors(part: str, dtype: Callable[[TaskSpec], torch.dtype]) -> dict[str, Tensor]:
            return {task.name: torch.tensor(plain[part][task.name], dtype=dtype(task)) for task in tasks}

        found = Predictions(
            tensors("logits", lambda _: torch.float32),
            tensors("labels", lambda task: kind_of(task).label_dtype),
            tensors("masks", lambda _: torch.bool),
        )
        return cls(tasks, plain["bags"], plain["sizes"], found)


def fold_outputs(config: RunConfig, place: Path, dataset: BagDataset, model: Any = None) -> FoldOutputs | None:
    """Those of the run at `place`, whose test bags `dataset` are: read, or else made by `model` or by the weights that
    are there, and written. None, which is said, where nothing is there."""
    path = place / FILE
    if path.is_file():
        return FoldOutputs.read(path)
    if model is None and RunDirectory(place).weights.is_file():
        model = load_run(place).model
    if model is None:
        print(f"{place}: has neither {FILE} nor weights: no predictions of its test bags", file=sys.stderr)
        return None
    fabric = make_fabric(config)
    with ops.prefer_backend(config.backend, strict=config.strict_backend):
        tasks = tuple(model.config.tasks)
        found = collect(fabric.to_device(model), dataset.with_tasks(tasks), fabric, config.data)
    outputs = FoldOutputs(tasks, dataset.names, dataset.sizes.tolist(), found)
    if fabric.is_global_zero:
        outputs.write(path)
    return outputs


def pooled_metrics(runs: Sequence[FoldOutputs]) -> dict[str, Any]:
    """Metrics over the test bags of several runs as one set: `tasks`, `mean_score` and the number of `bags`.

    Each run's outputs are read by its own specs: standardisation and thresholds are those of its training bags.
    """
    metrics = TaskMetrics(runs[0].tasks)
    for run in runs:
        metrics.update(run.found.logits, run.found.labels, run.found.masks, tasks=run.tasks)
    values = metrics.compute()
    return {
        "bags": sum(len(run.names) for run in runs),
        "tasks": values,
        "mean_score": mean_score(runs[0].tasks, values),
    }


def write_out_of_fold(path: Path, runs: Mapping[tuple[int, int], FoldOutputs]) -> None:
    """A line for every bag and repeat, (repeat, fold) by (repeat, fold): what the run predicts that was not trained on
    it, under the columns of `PredictionTable`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, ((repeat, fold), run) in enumerate(runs.items()):
        table = PredictionTable(run.tasks)
        if number == 0:
            writer.writerow(["repeat", "fold", *table.header()])
        lines = table.lines(run.names, run.sizes, run.found.logits)
        writer.writerows([repeat, fold, *line] for line in lines)
    write_text(path, text.getvalue())
