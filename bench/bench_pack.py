"""Reading one slide: TRIDENT's chunks of one row, CLAM's of 32, contiguous HDF5, and what `umda-fast pack` writes.

Everything is in the page cache, so that the files' layouts are compared and not the disk. Each contender ends with the
features in memory of its own; the packed ones, which are only mapped, are copied for it.
"""

import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from umda_fast.data import load_source, pack_slides

from .harness import arguments, medians, report

WIDTH = 1024


def write_chunked(path: Path, features: np.ndarray, coords: np.ndarray, rows: int, batch: int) -> None:
    """Resizable data sets in chunks of `rows` rows, grown by `batch` rows at a time, as the tools write them."""
    with h5py.File(path, "w") as file:
        for key, value in (("features", features), ("coords", coords)):
            width = value.shape[1]
            data = file.create_dataset(key, (0, width), value.dtype, maxshape=(None, width), chunks=(rows, width))
            for start in range(0, len(value), batch):
                part = value[start : start + batch]
                data.resize(start + len(part), axis=0)
                data[start:] = part


def through_h5py(path: Path) -> Tensor:
    with h5py.File(path) as file:
        file["coords"][()]
        return torch.from_numpy(file["features"][()])


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    instances = max(64, int(20_000 * options.size))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(instances, WIDTH)).astype(np.float32)
    coords = np.stack(np.divmod(np.arange(instances), 200), axis=1) * 256
    with tempfile.TemporaryDirectory() as name:
        folders = {kind: Path(name) / kind for kind in ("trident", "clam", "contiguous")}
        for folder in folders.values():
            folder.mkdir()
        files = {kind: folder / "slide.h5" for kind, folder in folders.items()}
        write_chunked(files["trident"], features, coords.astype(np.int64), 1, instances)
        write_chunked(files["clam"], features, coords.astype(np.int32), 32, 256)
        with h5py.File(files["contiguous"], "w") as file:
            file["features"], file["coords"] = features, coords
        pack_slides(folders["trident"], Path(name) / "packed")
        sources = {kind: load_source(folder).whole for kind, folder in folders.items()}
        packed = load_source(Path(name) / "packed").whole
        contenders = {
            "packed": lambda: packed[0].views["features"].clone(),
            "TRIDENT, umda_fast": lambda: sources["trident"][0].views["features"],
            "TRIDENT, h5py": lambda: through_h5py(files["trident"]),
            "CLAM, umda_fast": lambda: sources["clam"][0].views["features"],
            "CLAM, h5py": lambda: through_h5py(files["clam"]),
            "contiguous, umda_fast": lambda: sources["contiguous"][0].views["features"],
            "contiguous, h5py": lambda: through_h5py(files["contiguous"]),
        }
        for contender in contenders.values():
            np.testing.assert_array_equal(contender(), features)
        report(
            f"one slide of {instances} x {WIDTH} float32 with coordinates, from the page cache",
            medians(contenders, options.repeats),
        )


if __name__ == "__main__":
    main()
