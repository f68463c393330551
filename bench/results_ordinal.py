"""Grades in an order, by an ordinal and by a nominal head, a row of the table a bag of one instance.

    python -m bench.results_ordinal [--sets diabetes,wine] [--seeds 5] [--out docs/results/ordinal.json]

Two tables that scikit-learn ships. Diabetes: 442 patients, ten measurements, and how far the disease was a year later.
Wine: 178 wines, twelve measurements, and a thirteenth, the intensity of their colour, to be found from the others. Each
is cut at its quintiles into five grades (the cultivars of the wines have no order). Split at random for every seed:
60 % for training, 15 % for validation, 25 % for testing. UMDA of width 32, one layer, 200 updates, without a linear
model mixed in, and the linear model alone; the same for both heads, whose task is said to be of kind `ordinal` or
`multiclass` and which differ in nothing else.

Mean over the seeds ± standard error, on the test bags. `nominal`: the likeliest class; `nominal, middle grade`: of the
same probabilities the grade that an ordinal head would name, neither below nor above which lies more than half.
`ordinal to it`: the mean difference of the ordinal head's quadratic kappa to the row's, on the same bags, ± its
standard error; positive where the ordinal head is better.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from umda_fast.data import BagDataset, split_bags
from umda_fast.data.labels import fit_tasks
from umda_fast.model import TaskSpec, decode
from umda_fast.runtime.fabric import make_fabric
from umda_fast.score.collect import collect
from umda_fast.tasks import kind_of
from umda_fast.train import make_config, train

from . import tables

TITLE = "Ordinal"
SETS = {"diabetes": "Diabetes", "wine": "Wine, intensity of colour"}
MODELS = {"umda": {"architecture": "umda", "width": 32, "heads": 2, "layers": 1}, "linear": {"architecture": "linear"}}
HEADS = {"ordinal": "ordinal", "nominal": "multiclass"}
METRICS = {"kappa": "quadratic kappa", "mae_grades": "MAE in grades", "accuracy": "accuracy"}
GRADES = 5
BASE: tables.Values = {"device": "cpu", "train": {"steps": 200, "linear": "off", "keep": "scores"}}

Array = npt.NDArray[Any]


def load(name: str) -> tuple[Array, Array]:
    """Features, float32 [B, F], and grades 0 to 4."""
    from sklearn.datasets import load_diabetes, load_wine

    if name == "diabetes":
        x, y = load_diabetes(return_X_y=True)
    else:
        found = load_wine()
        column = found.feature_names.index("color_intensity")
        x, y = np.delete(found.data, column, axis=1), found.data[:, column]
    inner = np.quantile(y, np.arange(1, GRADES) / GRADES)
    return x.astype(np.float32), np.searchsorted(inner, y, side="right")


def parts_of(name: str, kind: str, seed: int) -> dict[str, BagDataset]:
    """The same bags for every kind: how they are split follows from the grades alone."""
    x, grades = load(name)
    bags = BagDataset.from_arrays({"row": x}, None, {"grade": grades}, kinds={"grade": kind}, name=name)
    rows = split_bags(bags, {"train": 0.6, "val": 0.15, "test": 0.25}, seed)
    tasks = fit_tasks(bags.tasks, bags.subset(rows["train"]).labels)
    return {split: bags.subset(own, split).with_tasks(tasks) for split, own in rows.items()}


def fit(values: Mapping[str, Any], parts: Mapping[str, BagDataset]) -> dict[str, Any]:
    """`decided`, the scores of what the head decides, and `middle`, of the middle grade of its probabilities; the test
    bags' names, by which one sees that they are the same."""
    began = time.process_time()
    config = make_config(values)
    with tempfile.TemporaryDirectory() as place:
        model = train(config, Path(place) / "run", datasets=parts, progress=False, plots=False).model
    test = parts["test"]
    (task,) = test.tasks
    logits, target = collect(model, test, make_fabric(config), config.data).of(task)
    probabilities, grades = decode(task, logits.double()).numpy(), target.numpy().astype(float)
    likeliest = np.eye(GRADES)[probabilities.argmax(axis=1)]
    decided = likeliest if task.kind == "multiclass" else probabilities
    seconds = time.process_time() - began
    return {"decided": scores(decided, grades), "middle": scores(probabilities, grades), "cpu_seconds": seconds}


def scores(probabilities: Array, grades: Array) -> dict[str, float]:
    """Of the middle grade."""
    task = TaskSpec("grade", "ordinal", classes=GRADES)
    found = kind_of(task).scores(task, probabilities, grades)
    return {metric: found[metric] for metric in METRICS}


def text(table: tables.Table) -> str:
    lines = [(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]]
    for name, title in SETS.items():
        cells = []
        for model in MODELS:
            heads = {head: table.where(data=name, model=model, head=head) for head in HEADS}
            if not all(heads.values()):
                continue
            rows = {
                f"**{model}, ordinal**": [run | run["decided"] for run in heads["ordinal"]],
                f"{model}, nominal": [run | run["decided"] for run in heads["nominal"]],
                f"{model}, nominal, middle grade": [run | run["middle"] for run in heads["nominal"]],
            }
            ours = next(iter(rows.values()))
            for row, runs in rows.items():
                shown = [tables.plus_minus((run[metric] for run in runs), 3) for metric in METRICS]
                apart = "" if runs is ours else tables.plus_minus(tables.paired(ours, runs, "kappa"), 3)
                cells.append([row, str(len(runs)), *shown, apart])
        if cells:
            header = ["model and head", "seeds", *METRICS.values(), "ordinal to it"]
            lines.append(f"## {title}\n\n{tables.markdown(header, cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = tables.parser(__doc__ or "", "ordinal.json", data=False)
    parser.add_argument("--sets", default=",".join(SETS))
    options = parser.parse_args()
    tables.start()
    table = tables.Table(options.out, "python -m bench.results_ordinal", {"base": BASE, "models": MODELS})
    for name in options.sets.split(","):
        for seed in range(options.seeds):
            for model, of_model in MODELS.items():
                values = tables.merged(BASE, {"seed": seed, "model": of_model})
                for head, kind in HEADS.items():
                    table.run(
                        {"data": name, "model": model, "head": head, "seed": seed},
                        lambda values=values, name=name, kind=kind, seed=seed: fit(values, parts_of(name, kind, seed)),
                    )
        table.write(TITLE, text(table))


if __name__ == "__main__":
    main()
