"""Files of the forms that real data sets have: generated ones always, the real ones too where they are."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.slide_files import NAMES, bag, write_clam, write_labels, write_trident

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
GENERATED = ("bags", "several_tasks", "views_only")


def _bags(rng):
    ptr = np.concatenate([[0], rng.integers(1, 12, 60).cumsum()])
    return {
        "X": rng.normal(size=(ptr[-1], 7)).astype(np.float32),
        "ptr": ptr.astype(np.int64),
        "y": rng.integers(0, 2, 60),
    }


def _several_tasks(rng):
    arrays = _bags(rng)
    del arrays["y"]
    arrays["Y"] = (rng.random((60, 3)) < [0.4, 0.2, 0.3]).astype(np.int64)
    arrays["tasks"] = np.array(["creeper", "wren", "chickadee"])
    return arrays


def _views_only(rng):
    arrays = {"y": np.repeat(np.arange(5), 20)}
    for name, width in (("pix", 9), ("fou", 4), ("mor", 2)):
        arrays[name] = rng.normal(size=(100, width)).astype(np.float32)
    return arrays


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """name -> arrays, and name -> file."""
    makers = (_bags, _several_tasks, _views_only)
    arrays = {
        name: maker(np.random.default_rng(index))
        for index, (name, maker) in enumerate(zip(GENERATED, makers, strict=True))
    }
    folder = tmp_path_factory.mktemp("npz")
    files = {name: folder / f"{name}.npz" for name in arrays}
    for name, file in files.items():
        np.savez(file, **arrays[name])
    return arrays, files


REAL_FILES = sorted(file.name for file in REAL.glob("*.npz"))


@pytest.fixture(params=[*GENERATED, *REAL_FILES])
def npz_file(request, generated):
    """Every generated file and every real one there is."""
    return REAL / request.param if request.param in REAL_FILES else generated[1][request.param]


@pytest.fixture
def clam(tmp_path):
    """Twelve slides of six patients, one view, two tasks with holes."""
    root = tmp_path / "clam"
    for index, name in enumerate(NAMES):
        write_clam(root, name, *bag(index))
    write_labels(
        root / "labels.csv",
        {
            "case_id": [f"p{index // 2}" for index in range(12)],
            "slide_id": NAMES,
            "label": ["tumor_tissue" if index % 4 < 2 else "normal_tissue" for index in range(12)],
            "age": ["" if index == 7 else 40.5 + index for index in range(12)],
        },
    )
    return root


@pytest.fixture
def trident(tmp_path):
    """Two encoders of the same slides; rows in another order, one row and one slide missing in the second."""
    job = tmp_path / "job"
    for index, name in enumerate(NAMES):
        features, coords = bag(index)
        order = np.random.default_rng(100 + index).permutation(len(features))[1:]
        folder = job / "20x_256px_0px_overlap"
        write_trident(folder / "features_uni_v1", name, features, coords, "uni_v1")
        if index != 5:
            write_trident(folder / "features_conch_v15", name, features[order, :3] + 100, coords[order], "conch_v15")
    patches = job / "20x_256px_0px_overlap" / "patches"
    patches.mkdir()
    with h5py.File(patches / "s00_patches.h5", "w") as file:
        file["coords"] = bag(0)[1]
    slide = job / "20x_256px_0px_overlap" / "slide_features_titan"
    slide.mkdir()
    with h5py.File(slide / "s00.h5", "w") as file:
        file["features"] = np.zeros(8, np.float32)
    (job / "_config_feats.json").write_text("{}")
    write_labels(job / "labels.tsv", {"slide": [f"{name}.svs" for name in NAMES], "grade": ([*"123"] * 4)}, "\t")
    return job
