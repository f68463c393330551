"""Files as CLAM, TRIDENT and STAMP write them: the same calls of h5py, dtypes, chunks and attributes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

Array = np.ndarray[Any, Any]

# TRIDENT's attributes of `coords` for a slide scanned at 40x, patches of 256 pixels at 20x.
TRIDENT_COORDS = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "slide",
    "savetodir": "job/20x_256px_0px_overlap",
    "level0_width": 120_000,
    "level0_height": 90_000,
}


def grid(rng: np.random.Generator, n: int, step: float = 512, side: int = 20) -> Array:
    """`n` places of a grid in random order, [n, 2]."""
    cells = rng.permutation(side * side)[:n]
    return np.stack([cells // side, cells % side], axis=1) * step


def write_clam(root: Path, name: str, features: Array, coords: Array, *, pt: bool = True, batch: int = 256) -> Path:
    """`h5_files/<name>.h5`, grown batch by batch, and `pt_files/<name>.pt`."""
    path = root / "h5_files" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"features": features.astype(np.float32), "coords": coords.astype(np.int32)}
    for start in range(0, len(features), batch):
        with h5py.File(path, "w" if start == 0 else "a") as file:
            for key, whole in content.items():
                part = whole[start : start + batch]
                if start == 0:
                    file.create_dataset(
                        key,
                        shape=part.shape,
                        maxshape=(None, part.shape[1]),
                        chunks=(32, part.shape[1]),
                        dtype=part.dtype,
                    )[:] = part
                else:
                    file[key].resize(len(file[key]) + len(part), axis=0)
                    file[key][-len(part) :] = part
    if pt:
        (root / "pt_files").mkdir(exist_ok=True)
        torch.save(torch.from_numpy(content["features"]), root / "pt_files" / f"{name}.pt")
    return path


def write_trident(
    folder: Path, name: str, features: Array, coords: Array, encoder: str | None = "uni_v1", **attributes: Any
) -> Path:
    """`<name>.h5` in a directory `features_<encoder>`; chunks of one row; None is written as text."""
    path = folder / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "features": {"name": name, "savetodir": str(folder), "encoder": encoder},
        "coords": {**TRIDENT_COORDS, "name": name, **attributes},
    }
    with h5py.File(path, "w") as file:
        for key, value in (("features", features), ("coords", coords.astype(np.int64))):
            rest = value.shape[1:]
            data = file.create_dataset(
                key, shape=value.shape, maxshape=(None, *rest), chunks=(1, *rest), dtype=value.dtype
            )
            data[:] = value
            for attribute, said in about[key].items():
                data.attrs[attribute] = "None" if said is None else said
    return path


def write_stamp(
    folder: Path, name: str, features: Array, coords: Array, extractor: str = "uni", **attributes: Any
) -> Path:
    """`<name>.h5`, contiguous, float16, micrometres; an attribute given as None is left out."""
    path = folder / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {
        "stamp_version": "2.4.0",
        "extractor": extractor,
        "unit": "um",
        "tile_size_um": 256.0,
        "tile_size_px": 224,
        "code_hash": "0123abcd",
        "feat_type": "tile",
        **attributes,
    }
    with h5py.File(path, "w") as file:
        file["coords"] = coords.astype(np.float32)
        file["feats"] = features.astype(np.float16)
        for key, value in said.items():
            if value is not None:
                file.attrs[key] = value
    return path


def write_labels(path: Path, columns: dict[str, list[Any]], delimiter: str = ",") -> Path:
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    path.write_text("".join(delimiter.join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return path


"""Slides of the directories that `clam` and `trident` of tests/data/conftest.py make."""
NAMES = [f"s{index:02d}" for index in range(12)]


def bag(index: int, n: int = 9, width: int = 4) -> tuple[Array, Array]:
    """Features and coordinates of slide `index`, of n to n + 2 patches."""
    rng = np.random.default_rng(index)
    return rng.normal(size=(n + index % 3, width)).astype(np.float32), grid(rng, n + index % 3)
