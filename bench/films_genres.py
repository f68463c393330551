"""Genres of films: plot and poster together against each alone, beside a linear one-vs-rest on the same features.

    python -m bench.films_genres --data DIR [--seeds 0 1 2] [--epochs 16] [--json FILE]

DIR holds movies.csv and poster_features.npy. Models are trained on nine tenths of the table's `train`; the other tenth
chooses weights, thresholds and the linear models' regularisation; macro F1 is on the table's `val`, which nothing was
chosen on. `f1` predicts from thresholds tuned for F1 (`train.thresholds`), `f1 at 1/2` from one half.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from umda_fast.data import BagDataset, Splits, load_source
from umda_fast.train import make_config, train
from umda_fast.train.collect import Predictions, collect
from umda_fast.train.metrics import TaskMetrics
from umda_fast.train.run import make_fabric
from umda_fast.train.thresholds import tune_thresholds

VIEWS = {"plot and poster": ("text", "poster"), "plot": ("text",), "poster": ("poster",)}
FIELDS = ("title", "overview", "tagline")
MODEL = {"layers": 1, "graph_layers": 1, "dropout": 0.3, "input_dropout": 0.5, "scale_wide": True}
TRAIN = {"lr": 1e-3, "ema": 0.98}
# Hashed n-grams have one unit and are mostly 0: centred and divided by their deviations, rare ones would drown others.
DATA = {"standardize": False}
STRENGTHS = (0.3, 1.0, 3.0)


def scores(splits: Splits, val: Predictions, test: Predictions) -> dict[str, float]:
    """Macro F1 and mean average precision on the test split."""
    (tuned,) = tune_thresholds(splits.tasks, val)

    def on(task: Any) -> dict[str, float]:
        metrics = TaskMetrics([task])
        metrics.update(test.logits, test.labels, test.masks)
        return metrics.compute()["genres"]

    half = on(replace(tuned, thresholds=None))
    return {"f1": on(tuned)["f1_macro"], "f1 at 1/2": half["f1_macro"], "map": half["map"]}


def ours(splits: Splits, seed: int, epochs: int) -> dict[str, float]:
    """A UMDA."""
    values = {"seed": seed, "data": DATA, "model": MODEL, "train": {**TRAIN, "epochs": epochs, "keep": "scores"}}
    config = make_config({**values, "device": "cpu"})
    with tempfile.TemporaryDirectory() as place:
        run = train(config, Path(place) / "run", datasets=splits, progress=False, plots=False)
    fabric = make_fabric(config)
    val, test = (collect(run.model, splits[name], fabric, config.data) for name in ("val", "test"))
    return scores(splits, val, test)


def rows(dataset: BagDataset, scale: np.ndarray) -> Any:
    """CSR, a row for each film: its first instance, which is the whole plot, with the poster as `scale` has it."""
    bags = [dataset[index] for index in range(len(dataset))]
    parts = []
    if "text" in bags[0].views:
        present = [bag.views["text"][0] * (bag.mask is None or bool(bag.mask[0, 0])) for bag in bags]
        parts.append(torch.stack(present).numpy())
    if "poster" in bags[0].views:
        parts.append(np.stack([bag.views["poster"][0].numpy() for bag in bags]) * scale)
    return csr_matrix(np.concatenate(parts, axis=1))


def linear(splits: Splits) -> dict[str, float]:
    """Logistic regression, one versus rest with balanced classes, its strength chosen on the validation split."""
    scale = np.ones(1)
    if any(view.name == "poster" for view in splits.views):
        posters = [splits.train[index].views["poster"][0].numpy() for index in range(len(splits.train))]
        scale = 0.05 / np.std(posters, axis=0).clip(1e-6)  # beside a plot of length 1
    features = {name: rows(splits[name], scale) for name in ("train", "val", "test")}
    labels = {name: splits[name].labels["genres"] for name in features}
    found = []
    for strength in STRENGTHS:
        model = OneVsRestClassifier(LogisticRegression(C=strength, class_weight="balanced", max_iter=300))
        model.fit(features["train"], labels["train"])
        val, test = (_predictions(model, features[name], labels[name]) for name in ("val", "test"))
        found.append((scores(splits, val, val)["f1 at 1/2"], scores(splits, val, test)))
    return max(found, key=lambda pair: pair[0])[1]


def _predictions(model: Any, features: Any, labels: np.ndarray) -> Predictions:
    logits = torch.from_numpy(model.decision_function(features)).float()
    everywhere = torch.ones(len(labels), dtype=torch.bool)
    return Predictions({"genres": logits}, {"genres": torch.from_numpy(labels).float()}, {"genres": everywhere})


def line(name: str, results: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One line of the table: mean and, over several seeds, standard deviation."""
    cells = []
    for metric in ("f1", "f1 at 1/2", "map"):
        values = [result[metric] for result in results]
        spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.3f}{spread}")
    print(f"{name:<32} " + " ".join(f"{cell:>15}" for cell in cells), flush=True)
    return {"name": name, "results": list(results)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["linear", "umda"])
    parser.add_argument("--views", nargs="+", choices=list(VIEWS), default=list(VIEWS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = []
    print(f"{'':<32} {'f1':>15} {'f1 at 1/2':>15} {'map':>15}")
    for name in options.views:
        shared: dict[str, Any] = {
            "views": VIEWS[name],
            "tasks": ["genres"],
            "fields": FIELDS,
            "class_weights": "balanced",
        }
        splits = load_source(options.data, **shared)
        if options.only != "umda":
            table.append(line(f"linear, {name}", [linear(splits)]))
        if options.only != "linear":
            table.append(line(f"umda, {name}", [ours(splits, seed, options.epochs) for seed in options.seeds]))
    if options.json is not None:
        options.json.write_text(json.dumps({"epochs": options.epochs, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
