"""Survival of breast cancer (GBSG2) and after a heart attack (WHAS500), a row of the table a bag of one instance.

    python -m bench.results_survival [--sets gbsg2,whas500] [--seeds 5] [--out docs/results/survival.json]

The tables are those that scikit-survival ships, which has to be installed: 686 women and 299 events, 500 patients and
215 events; categories as columns of 0 and 1. Split at random for every seed: 65 % for training, 15 % for validation,
20 % for testing. Models are trained by the plain command, defaults for everything; UMDA is what `umda-fast train`
leaves, with whatever it mixed in, `UMDA alone` the same without that. Cox: `CoxPHSurvivalAnalysis` of scikit-survival,
fitted to training and validation bags, for there is nothing to choose.

Mean over the seeds ± standard error, on the test bags. `UMDA to it`: the mean difference of UMDA's C-index (Harrell)
to the row's, on the same bags, ± its standard error; positive where UMDA is better.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from umda_fast.data import BagDataset, split_bags
from umda_fast.data.labels import fit_tasks
from umda_fast.tasks.survival_scores import harrell, uno

from . import tables
from .results_plain import BASE, fit

TITLE = "Survival"
SETS = {"gbsg2": "GBSG2", "whas500": "WHAS500"}
MODELS = ("umda", "linear", "mean_pooling")
METRICS = {"c_index": "C-index (Harrell)", "c_index_uno": "C-index (Uno)", "ibs": "integrated Brier score"}


def load(name: str) -> BagDataset:
    """All rows, as they are in the table."""
    from sksurv import datasets
    from sksurv.preprocessing import OneHotEncoder

    table, labels = getattr(datasets, f"load_{name}")()
    x = OneHotEncoder().fit_transform(table).to_numpy(dtype=np.float32)
    event, months = labels.dtype.names
    column = np.stack([labels[months], labels[event]], axis=1).astype(float)
    return BagDataset.from_arrays({"row": x}, None, {"survival": column}, kinds={"survival": "survival"}, name=name)


def parts_of(bags: BagDataset, seed: int) -> dict[str, BagDataset]:
    rows = split_bags(bags, {"train": 0.65, "val": 0.15, "test": 0.2}, seed)
    tasks = fit_tasks(bags.tasks, bags.subset(rows["train"]).labels)
    return {split: bags.subset(own, split).with_tasks(tasks) for split, own in rows.items()}


def cox(parts: Mapping[str, BagDataset]) -> dict[str, Any]:
    """Scores of Cox's model on the test bags."""
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.util import Surv

    def features(split: str) -> np.ndarray[Any, Any]:
        own = parts[split]
        return np.concatenate([own[row].views["row"].numpy() for row in range(len(own))]).astype(float)

    began = time.process_time()
    x = np.concatenate([features("train"), features("val")])
    known = np.concatenate([parts["train"].labels["survival"], parts["val"].labels["survival"]])
    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1.0
    model = CoxPHSurvivalAnalysis().fit((x - mean) / std, Surv.from_arrays(known[:, 1] == 1, known[:, 0]))
    risk, (months, event) = model.predict((features("test") - mean) / std), parts["test"].labels["survival"].T
    scores = {"c_index": harrell(risk, months, event), "c_index_uno": uno(risk, months, event), "ibs": None}
    return {"tasks": {"survival": scores}, "cpu_seconds": time.process_time() - began}


def text(table: tables.Table) -> str:
    lines = [(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]]
    for name, title in SETS.items():
        ours = table.where(data=name, model="umda")
        if not ours:
            continue
        rows = {"**UMDA**": ours, "UMDA alone": [{**run, **run["alone"]} for run in ours]}
        rows |= {model.replace("_", " "): table.where(data=name, model=model) for model in (*MODELS[1:], "cox")}
        cells = []
        for row, runs in rows.items():
            if not runs:
                continue
            found = [run | run["tasks"]["survival"] for run in runs]
            scores = [tables.plus_minus((run[metric] for run in found), 3) for metric in METRICS]
            apart = tables.paired([run | run["tasks"]["survival"] for run in ours], found, "c_index")
            last = "" if runs is ours else tables.plus_minus(apart, 3)
            seconds = tables.mean_error(run["cpu_seconds"] for run in runs)[0]
            cells.append([row, str(len(runs)), *scores, last, f"{seconds:.1f}"])
        header = ["model", "seeds", *METRICS.values(), "UMDA to it", "CPU s"]
        lines.append(f"## {title}\n\n{tables.markdown(header, cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = tables.parser(__doc__ or "", "survival.json", data=False)
    parser.add_argument("--sets", default=",".join(SETS))
    options = parser.parse_args()
    tables.start()
    table = tables.Table(options.out, "python -m bench.results_survival", {"base": BASE})
    table.write(TITLE, text(table))
    for name in options.sets.split(","):
        bags = load(name)
        for seed in range(options.seeds):
            parts, values = parts_of(bags, seed), tables.merged(BASE, {"seed": seed})
            table.run({"data": name, "model": "cox", "seed": seed}, lambda parts=parts: cox(parts))
            for model in MODELS:
                table.run(
                    {"data": name, "model": model, "seed": seed},
                    lambda model=model, parts=parts, values=values: fit(values, parts, model),
                )
            table.write(TITLE, text(table))


if __name__ == "__main__":
    main()
