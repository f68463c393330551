"""Handwritten digits from three weak views (zer, fou, mor), with views missing at random.

    python -m bench.results_mfeat --data DIR [--out docs/results/mfeat.json]

`mfeat.npz`, 2000 digits, each a bag of one instance: 47 Zernike moments, 76 Fourier coefficients, 6 morphological
features; 10 classes, 1300 for training, 300 for validation, 400 for testing. A share of the views of every instance
is left out, in training and in testing, each instance keeping at least one. Late fusion: a model per view, logits
averaged over the views present. Concatenation: encoded views side by side, zero where missing. Accuracy on the test
split, mean over five seeds (of the split, the holes and the model) ± standard error; gain: mean over the seeds of the
difference of UMDA to the better of the two others ± standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench import tables
from umda_fast.data import BagDataset, split_bags

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
    for share in MISSING:
        scores = {
            model: {run["key"]["seed"]: run["accuracy"] for run in table.where(model=model, missing=share)}
            for model in MODELS
        }
        seeds = [s for s in scores["UMDA"] if all(s in known for known in scores.values())]
        better = [scores["UMDA"][s] - max(scores[m][s] for m in MODELS if m != "UMDA") for s in seeds]
        cells = [tables.plus_minus(known.values()) for known in scores.values()]
        rows.append([f"{share:.0%}", *cells, tables.plus_minus(better)])
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    seconds = [
        [model, f"{table.where(model=model)[0]['parameters']:,}",
         tables.plus_minus((run["cpu_seconds"] for run in table.where(model=model)), 1)]
        for model in MODELS
        if table.where(model=model)
    ]
    return (
        f"{about}\n{tables.markdown(['views missing', *MODELS, 'gain'], rows)}\n"
        + tables.markdown(["model", "parameters", "CPU s per run"], seconds)
    )


def main() -> None:
    options = tables.parser(__doc__ or "", "mfeat.json").parse_args()
    tables.start()
    settings = {"common": COMMON, "models": MODELS, "views": VIEWS}
    table = tables.Table(options.out, "python -m bench.results_mfeat --data DIR", settings)
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
        table.write("Digits from weak views, some missing", text(table))


if __name__ == "__main__":
    main()
