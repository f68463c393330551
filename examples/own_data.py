"""Your own arrays, from numpy to predictions; seconds on a laptop.

    python examples/own_data.py --out runs/own_data

Forty bags are made up here. Replace `make_arrays` by whatever loads yours: one matrix per view, the offsets
of the bags in them, one array of labels per task with NaN where a label is missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from umda_fast.data import BagDataset, split_bags
from umda_fast.train import evaluate, load_run, make_config, predict, train


def make_arrays(seed: int = 0, bags: int = 80) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Features of two views [N, 8] and [N, 5], offsets `ptr` [bags + 1], and labels of two tasks."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 12, bags)
    ptr = np.concatenate([[0], sizes.cumsum()])
    positive = rng.random(bags) < 0.5
    features = rng.normal(size=(int(ptr[-1]), 8))
    for bag in np.flatnonzero(positive):  # a positive bag holds at least one shifted instance
        features[ptr[bag], :4] += 3.0
    other = features @ rng.normal(size=(8, 5)) + 0.1 * rng.normal(size=(int(ptr[-1]), 5))
    size = np.log(sizes.astype(np.float64))
    size[rng.random(bags) < 0.1] = np.nan  # missing labels
    return (
        {"stain": features, "texture": other},
        ptr,
        {"tumour": positive.astype(np.float64), "log_size": size},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/own_data"), help="directory for the run")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()

    # 1. Arrays -> bags. Kinds of tasks are inferred: two values make a binary task, real numbers a
    # regression.
    views, ptr, labels = make_arrays()
    bags = BagDataset.from_arrays(views, ptr, labels, name="my slides")

    # 2. Split at random, stratified by all tasks.
    parts = split_bags(bags, {"train": 0.6, "val": 0.2, "test": 0.2}, seed=0)
    datasets = {name: bags.subset(rows, name) for name, rows in parts.items()}

    # 3. Train. The run directory holds weights, metrics, plots and a checkpoint.
    config = make_config(
        {
            "model": {"width": 32, "heads": 2, "layers": 1},
            "train": {"epochs": options.epochs},
            "data": {"budget": 128},
        }
    )
    result = train(config, options.out, datasets=datasets)
    print(f"test: {result.metrics['tasks']}")

    # 4. Later, or elsewhere: read the run back, measure it, predict for bags without labels.
    run = load_run(options.out)
    print(f"validation mean_score: {evaluate(run, datasets=datasets, split='val').mean_score:.3f}")
    new_views, new_ptr, _ = make_arrays(seed=1, bags=5)
    new = BagDataset.from_arrays(new_views, new_ptr, name="new slides")
    predict(run, datasets={"all": new}, out=options.out / "predictions.csv")
    print((options.out / "predictions.csv").read_text(), end="")


if __name__ == "__main__":
    main()
