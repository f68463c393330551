"""Genres of films: plot and poster together, against each alone and a linear model on the same features.

    python -m bench.results_films --data DIR --encoder MODEL [--out docs/results/films.json]

`movies`, 19 genres (multilabel). Plot: title, overview and tagline as hashed character n-grams, and in the second part
also as vectors of a pretrained sentence encoder (MODEL, a folder or name; without it only the first part is made; the
table is of all-MiniLM-L6-v2). Macro F1 on the table's `val`, which nothing was chosen on; models are trained on nine
tenths of its `train`, drawn anew for every seed, and the other tenth chooses the epoch and the linear model's strength.
UMDA's options are the same in every row; they were chosen on parts of the table's `train`, too.
Linear: logistic regression, one versus rest, balanced classes, of n-grams and vectors of length 1 and standardised
posters. Mean over the seeds (of that draw and the model) ± standard error; `to linear` is the mean of the differences.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from umda_fast.data import BagDataset, Splits, load_source
from umda_fast.score.metrics import TaskMetrics

from . import tables

TITLE = "Genres of films"
FEATURES: dict[str, tuple[str, ...]] = {"n-grams": ("text",), "n-grams and encoder": ("text", "embedding")}
INPUTS = ("plot and poster", "plot", "poster")
SOURCE: dict[str, Any] = {
    "tasks": ["genres"],
    "fields": ["title", "overview", "tagline"],
    "sentences": False,
    "class_weights": "balanced",
}
STRENGTHS = (0.3, 1.0, 3.0)
POSTER = 0.05  # length of a poster's standardised features relative to a plot's, per feature
COMMON: dict[str, Any] = {
    "data": {"budget": 64},
    "model": {
        "width": 64,
        "layers": 1,
        "graph": False,  # a film is one instance here
        "dropout": 0.5,
        "input_dropout": 0.5,
        "scale_wide": True,
        "linear_path": True,
    },
    "sgl": {"balancer": "none"},  # one task
    "train": {"epochs": 8, "lr": 3e-3, "ema": 0.98, "log_steps": 1000},
}


def views(features: str, inputs: str) -> list[str]:
    """The views of one row."""
    return [*(FEATURES[features] if "plot" in inputs else ()), *(["poster"] if "poster" in inputs else ())]


def rows() -> list[tuple[str, str]]:
    """Features and inputs of every row; posters are the same in both parts."""
    return [(features, inputs) for features in FEATURES for inputs in INPUTS if (features, inputs) != (
        "n-grams and encoder", "poster"
    )]  # fmt: skip


def load(source: Path, encoder: str | None, names: list[str], seed: int) -> Splits:
    given = {"encoder": encoder} if "embedding" in names else {}
    return load_source(source, seed=seed, views=names, **SOURCE, **given)


def ours(splits: Splits, seed: int, epochs: int | None) -> dict[str, Any]:
    """A UMDA."""
    values = tables.merged(COMMON, {"seed": seed})
    # n-grams and sentence vectors have one length and one unit
    values["data"]["standardize"] = [view.name for view in splits.views if view.name == "poster"]
    if epochs:
        values["train"]["epochs"] = epochs
    found = tables.fit(values, splits)
    genres = found["tasks"]["genres"]
    keys = ("parameters", "cpu_seconds")
    return {"f1": genres["f1_macro"], "map": genres["map"], **{key: found[key] for key in keys}}


def matrix(dataset: BagDataset, centre: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]) -> Any:
    """CSR [films, features] of the whole plots and, less `centre` and times `scale`, the posters; 0 where missing."""
    parts = []
    for column, view in enumerate(dataset.views):
        bags = [dataset[index] for index in range(len(dataset))]
        there = np.array([bag.mask is None or bool(bag.mask[0, column]) for bag in bags])
        x = np.stack([bag.views[view.name][0].numpy() for bag in bags])
        parts.append(np.where(there[:, None], (x - centre) * scale if view.name == "poster" else x, 0.0))
    return csr_matrix(np.concatenate(parts, axis=1))


def linear(splits: Splits) -> dict[str, Any]:
    """The logistic regression whose strength is the best on the validation split."""
    began = time.process_time()
    posters = np.zeros((2, 1))
    if any(view.name == "poster" for view in splits.views):
        posters = np.stack([splits.train[index].views["poster"][0].numpy() for index in range(len(splits.train))])
    centre = np.nanmean(posters, axis=0)
    scale = POSTER / np.nanstd(posters, axis=0).clip(1e-6)
    features = {name: matrix(splits[name], centre, scale) for name in ("train", "val", "test")}
    labels = {name: splits[name].labels["genres"] for name in features}
    best: dict[str, Any] = {"val": -1.0}
    for strength in STRENGTHS:
        model = OneVsRestClassifier(LogisticRegression(C=strength, class_weight="balanced", max_iter=300))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features["train"], labels["train"])
        found = {
            name: scores(splits, model.decision_function(features[name]), labels[name]) for name in ("val", "test")
        }
        if found["val"]["f1"] > best["val"]:
            best = {"val": found["val"]["f1"], "strength": strength, **found["test"]}
    del best["val"]
    return {**best, "cpu_seconds": time.process_time() - began}


def scores(splits: Splits, logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
    """Macro F1 of probabilities of one half and mean average precision."""
    metrics = TaskMetrics(splits.tasks)
    everywhere = {"genres": torch.ones(len(labels), dtype=torch.bool)}
    metrics.update(
        {"genres": torch.from_numpy(logits).float()}, {"genres": torch.from_numpy(labels).float()}, everywhere
    )
    found = metrics.compute()["genres"]
    return {"f1": found["f1_macro"], "map": found["map"]}


def text(table: tables.Table) -> str:
    lines = []
    for features, inputs in rows():
        runs = {model: table.where(model=model, features=features, inputs=inputs) for model in ("UMDA", "linear")}
        if not runs["UMDA"]:
            continue
        cells = [tables.plus_minus((run[score] for run in runs[model]), 3) for score in ("f1", "map") for model in runs]
        gain = tables.plus_minus(tables.paired(runs["UMDA"], runs["linear"], "f1"), 3)
        seconds = tables.plus_minus((run["cpu_seconds"] for run in runs["UMDA"]), 0)
        named = "-" if inputs == "poster" else features
        lines.append([inputs, named, str(len(runs["UMDA"])), *cells[:2], gain, *cells[2:], seconds])
    header = ["", "text", "seeds", "UMDA, F1", "linear, F1", "to linear", "UMDA, mAP", "linear, mAP", "CPU s"]
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    return f"{about}\n{tables.markdown(header, lines)}"


def main() -> None:
    parser = tables.parser(__doc__ or "", "films.json")
    parser.add_argument("--encoder", metavar="MODEL", help="a sentence-transformers model")
    options = parser.parse_args()
    tables.start()
    settings: Mapping[str, Any] = {
        "common": COMMON, "source": SOURCE, "features": FEATURES, "strengths": STRENGTHS, "poster": POSTER,
    }  # fmt: skip
    table = tables.Table(options.out, "python -m bench.results_films --data DIR --encoder MODEL", settings)
    table.write(TITLE, text(table))
    for seed in range(options.seeds):
        for features, inputs in rows():
            names = views(features, inputs)
            if "embedding" in names and options.encoder is None:
                continue
            splits = load(options.data / "movies", options.encoder, names, seed)
            key = {"features": features, "inputs": inputs, "seed": seed}
            table.run({"model": "linear", **key}, lambda splits=splits: linear(splits))
            table.run(
                {"model": "UMDA", **key},
                lambda splits=splits, seed=seed: ours(splits, seed, options.epochs),
            )
        table.write(TITLE, text(table))


if __name__ == "__main__":
    main()
