"""A directory of slides as TRIDENT leaves it, from features to predictions; seconds on a laptop.

    python examples/slides.py --out runs/slides

Twenty-four slides of twelve patients are made up here, two encoders each; with your own, begin at "2.". The same from
the command line: `umda-fast inspect DIR`, `umda-fast train --data DIR`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import h5py
import numpy as np

from umda_fast.data import inspect_source, load_source, pack_slides
from umda_fast.train import load_run, make_config, predict, train


def write_slides(root: Path, seed: int = 0) -> None:
    """`features_<encoder>/<slide>.h5`, patches in another order for each encoder, and labels.csv."""
    rng = np.random.default_rng(seed)
    rows = []
    for slide in range(24):
        name, patient, tumour = f"slide_{slide:02d}", f"patient_{slide // 2:02d}", slide // 2 % 2
        cells = rng.permutation(400)[: rng.integers(30, 80)]
        coords = np.stack(np.divmod(cells, 20), axis=1) * 512  # level-0 pixels
        features = rng.normal(size=(len(coords), 24)).astype(np.float32)
        features[: len(coords) // 4, :6] += 1.5 * tumour  # a quarter of the patches shows it
        for encoder, width in (("uni_v1", 24), ("conch_v15", 16)):
            order = rng.permutation(len(coords))[rng.integers(0, 4) :]  # a few patches are missing
            folder = root / "20x_256px_0px_overlap" / f"features_{encoder}"
            folder.mkdir(parents=True, exist_ok=True)
            with h5py.File(folder / f"{name}.h5", "w") as file:
                file["features"] = features[order, :width]
                file["features"].attrs["encoder"] = encoder
                file["coords"] = coords[order]
                size = {"patch_size": 256, "patch_size_level0": 512, "overlap": 0}
                file["coords"].attrs.update({**size, "level0_magnification": 40, "target_magnification": 20})
        age = f"{60 + 8 * tumour + rng.normal():.1f}" if slide % 5 else ""  # blank: missing
        rows.append([patient, f"{name}.svs", ["normal", "tumour"][tumour], age])
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["case_id", "slide_id", "diagnosis", "age"], *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/slides"), help="directory for slides and run")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    # 1. Made-up slides.
    slides = options.out / "slides"
    write_slides(slides)

    # 2. What is there, and what is wrong with it.
    report = inspect_source(slides)
    print(report.description)
    print("first problem:", report.first_problem)

    # 3. Read one bag: features by view, which patch has which view, positions.
    whole = load_source(slides).whole
    bag = whole[0]
    assert bag.mask is not None
    assert whole.positions is not None
    print(bag.name, {view: tuple(x.shape) for view, x in bag.views.items()}, f"{bag.mask.double().mean():.0%} there")
    print(f"patches of {whole.positions.patch_size[0]:g} {whole.positions.unit}")

    # 4. Once, for many epochs over many slides: one file per view instead of one per slide.
    packed = options.out / "packed"
    print(pack_slides(slides, packed))

    # 5. Train and predict; either directory will do.
    config = make_config(
        {
            "data": {"source": str(packed), "budget": 400, "options": {"class_weights": "balanced"}},
            "model": {"width": 32, "heads": 2, "layers": 1},
            "train": {"epochs": options.epochs},
        }
    )
    result = train(config, options.out / "run", progress=False)
    print(result.metrics["tasks"])
    predict(load_run(result.directory), source=str(slides), out=options.out / "predictions.csv", progress=False)


if __name__ == "__main__":
    main()
