"""Handwritten digits from three weak views (zer, fou, mor), with views missing at random.

    python -m bench.results_mfeat --data DIR [--out docs/results/mfeat.json]

`mfeat.npz`, 2000 digits, each a bag of one instance: 47 Zernike moments, 76 Fourier coefficients, 6 morphological
features; 10 classes, 1300 for training, 300 for validation, 400 for testing. A share of the views of every instance
is left out, in training and in testing, each instance keeping at least one. Late fusion: a model per view, logits
averaged over the views present. Concatenation: encoded views side by side, zero where missing. Accuracy on the test
split, mean over the seeds (of the split, the holes and the model; `--seeds`, five unless the table says less) ±
standard error; the last columns are means over the seeds of the differences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from umda_fast.data import BagDataset, split_bags

from . import tables

TITLE = "Digits from weak views, some missing"
VIEWS = ("zer", "fou", "mor")
MISSING = (0.0, 0.25, 0.5)
COMMON: dict[str, Any] = {
    "data": {"budget": 128},
    "train": {"epochs": 25, "lr": 3e-3, "log_steps": 1000},
    "sgl": {"balancer": "none"},
}
MODELS: dict[str, dict[str, Any]] = {
    "UMDA": {"model": {"width": 64, "heads": 4, "layers": 2, "graph": False}},
    "concatenation": {"model": {"architecture": "mean_pooling", "width": 64}},
    "late fusion": {"model": {"architecture": "late_fusion", "width": 64}},
}


def holes(bags: int, share: float, seed: int) -> np.ndarray[Any, Any]:
    """Which views every instance has, bool [bags, views]; at least one each."""
    rng = np.random.default_rng([7, seed])
    present = rng.random((bags, len(VIEWS))) >= share
    kept = rng.integers(0, len(VIEWS), bags)
    bare = ~present.any(axis=1)
    present[bare, kept[bare]] = True
    return present


def load(path: Path, share: float, seed: int) -> dict[str, BagDataset]:
    arrays = np.load(path)
    labels = {"digit": arrays["y"]}
    mask = holes(len(arrays["y"]), share, seed)
    views = {name: np.where(mask[:, [i]], arrays[name], 0).astype(np.float32) for i, name in enumerate(VIEWS)}
    bags = BagDataset.from_arrays(views, None, labels, mask=mask, kinds={"digit": "multiclass"}, name="mfeat")
    parts = split_bags(bags, {"train": 0.65, "val": 0.15, "test": 0.2}, seed)
    return {name: bags.subset(rows, name) for name, rows in parts.items()}


def measure(values: dict[str, Any], datasets: dict[str, BagDataset]) -> dict[str, Any]:
    found = tables.fit(values, datasets)
    keys = ("parameters", "cpu_seconds")
    return {"accuracy": found["tasks"]["digit"]["accuracy"], **{key: found[key] for key in keys}}


def text(table: tables.Table) -> str:
    rows = []
    others = [model for model in MODELS if model != "UMDA"]
    for share in MISSING:
        runs = {model: table.where(model=model, missing=share) for model in MODELS}
        cells = [tables.plus_minus(run["accuracy"] for run in known) for known in runs.values()]
        gains = [tables.plus_minus(tables.paired(runs["UMDA"], runs[model], "accuracy")) for model in others]
        rows.append([f"{share:.0%}", str(len(runs["UMDA"])), *cells, *gains])
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    seconds = []
    for model in MODELS:
        runs_of_all = table.where(model=model)
        if runs_of_all:
            took = tables.plus_minus((run["cpu_seconds"] for run in runs_of_all), 1)
            seconds.append([model, f"{runs_of_all[0]['parameters']:,}", took])
    header = ["views missing", "seeds", *MODELS, *(f"UMDA to {model}" for model in others)]
    return (
        f"{about}\n{tables.markdown(header, rows)}\n"
        + tables.markdown(["model", "parameters", "CPU s per run"], seconds)
    )


def main() -> None:
    options = tables.parser(__doc__ or "", "mfeat.json").parse_args()
    tables.start()
    settings = {"common": COMMON, "models": MODELS, "views": VIEWS}
    table = tables.Table(options.out, "python -m bench.results_mfeat --data DIR", settings)
    table.write(TITLE, text(table))
    for seed in range(options.seeds):
        for share in MISSING:
            datasets = load(options.data / "mfeat.npz", share, seed)
            for model, change in MODELS.items():
                values = tables.merged(COMMON, {"seed": seed}, change)
                if options.epochs:
                    values["train"]["epochs"] = options.epochs
                table.run(
                    {"model": model, "missing": share, "seed": seed},
                    lambda values=values, datasets=datasets: measure(values, datasets),
                )
        table.write(TITLE, text(table))


if __name__ == "__main__":
    main()
