"""Files of the forms that real data sets have: generated ones always, the real ones too where they are."""

from pathlib import Path

import numpy as np
import pytest

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
