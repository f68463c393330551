"""The MM-IMDb source: `multimodal_imdb.hdf5` as its authors distribute it; a film is a bag of one instance.

features [N, 300] f4        plots, mean word vectors: the view `text`
vgg_features [N, 4096] f4   posters through a VGG network: the view `poster`
genres [N, 23] i4           0 or 1, attribute `target_names` a JSON list: the multilabel task `genres`
imdb_ids [N] S7             names of the bags (may be absent)
split                       attribute of the file: rows of `train`, `dev` and `test` (may be absent)

What else is in it (`sequences`, `images`, n-grams) is not read. A row of NaN is a missing view.

Source: Arevalo et al., "Gated Multimodal Units for Information Fusion", ICLR workshop 2017; the split attribute is that
of fuel's `H5PYDataset`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.bag import Bag, bag_labels
from umda_fast.data.dataset import BagDataset
from umda_fast.data.labels import ClassWeights, ignore_label, missing_labels
from umda_fast.data.options import option, some_of
from umda_fast.data.sources.base import BagSource, Folds, GivenSplit, OpenedSource
from umda_fast.errors import DataError
from umda_fast.extras import require
from umda_fast.model.specs import TaskSpec, ViewSpec

VIEWS = {"text": "features", "poster": "vgg_features"}
TASK = "genres"
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SPLITS = {"train": "train", "dev": "val", "valid": "val", "val": "val", "test": "test"}
# Published with the data: rows of train, dev and test, for a file that has lost its attribute.
_PUBLISHED: dict[int, dict[str, tuple[int, int]]] = {
    25959: {"train": (0, 15552), "val": (15552, 18160), "test": (18160, 25959)}
}


def is_mmimdb(source: str) -> bool:
    """Whether `source` is an HDF5 file with genres and both kinds of features."""
    if not Path(source).is_file():
        return False
    with open(source, "rb") as stream:
        if stream.read(len(_SIGNATURE)) != _SIGNATURE:
            return False
    require(f"{source}: reading it", "h5py")
    import h5py

    with suppress(OSError), h5py.File(source, "r") as file:
        return all(isinstance(file.get(name), h5py.Dataset) for name in (TASK, *VIEWS.values()))
    return False


class FilmRows:
    """Rows of the file as bags of one instance. The file is opened in each process that reads, on its first read."""

    def __init__(
        self, path: str, names: Sequence[str], views: Sequence[str], tasks: Sequence[TaskSpec], labels: FloatArray
    ) -> None:
        self._path = path
        self._views = tuple(views)
        self._tasks = tuple(tasks)
        self._file: Any = None
        self._process = -1
        self.names = names
        self.sizes: IntArray = np.ones(len(names), dtype=np.int64)
        self.labels: Mapping[str, FloatArray] = {TASK: labels}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_process": -1}

    def _open(self) -> Any:
        # A handle that came through a fork shares its position in the file with the parent's.
        if self._process != os.getpid():
            import h5py

            self._file, self._process = h5py.File(self._path, "r"), os.getpid()
        return self._file

    def load(self, index: int) -> Bag:
        try:
            views = {name: torch.from_numpy(self._open()[VIEWS[name]][index : index + 1]) for name in self._views}
        except (OSError, KeyError) as error:
            raise DataError(f"{self._path}: row {index}: cannot be read: {error}") from error
        mask = torch.stack([~features.isnan().all(1) for features in views.values()], dim=1)
        return Bag(self.names[index], views, mask, bag_labels(self._tasks, self.labels, index))


def _open_file(
    path: str, views: Sequence[str] | None, kinds: Sequence[TaskSpec] | None
) -> tuple[BagDataset, dict[str, IntArray] | None]:
    """All films, and the rows of the splits that the file names."""
    import h5py

    chosen = some_of(path, "views", views, tuple(VIEWS))
    try:
        with h5py.File(path, "r") as file:
            genres = _dataset(path, file, TASK)
            rows = genres.shape[0]
            labels = np.asarray(genres[:], dtype=np.float64)
            specs = [ViewSpec(name, _dataset(path, file, VIEWS[name], rows).shape[1]) for name in chosen]
            names = [f"film {row}" for row in range(rows)]
            if "imdb_ids" in file:
                names = [
                    item.decode() if isinstance(item, bytes) else str(item) for item in file["imdb_ids"][:].tolist()
                ]
            target_names = genres.attrs.get("target_names")
            split = file.attrs.get("split")
    except OSError as error:
        raise DataError(f"{path}: expected a readable HDF5 file, got: {error}") from error
    if len(names) != rows:
        raise DataError(f"{path}: imdb_ids: expected {rows} as {TASK} has, got {len(names)}")
    wrong = np.argwhere((labels != 0) & (labels != 1))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(f"{path}: {TASK}: expected 0 or 1, got {labels[row, column]:g} in row {row}, column {column}")
    task = _task(path, target_names, labels.shape[1])
    given = [spec for spec in kinds or () if spec.name == TASK]
    if given:
        if (given[0].kind, given[0].labels) != (task.kind, task.labels):
            message = f"{path}: kinds: expected multilabel with labels {task.labels}, got {given[0]}"
            ignore_label(kinds, DataError(message))
            labels = missing_labels(given[0], rows)
        task = given[0]
    store = FilmRows(path, names, chosen, [task], labels)
    return BagDataset(store, specs, [task], path), _parts(path, split, rows)


def _dataset(path: str, file: Any, name: str, rows: int | None = None) -> Any:
    """A matrix of the file, with `rows` rows."""
    if name not in file:
        raise DataError(f"{path}: expected a dataset {name!r}, got {', '.join(file)}")
    dataset = file[name]
    shape: tuple[int, ...] = getattr(dataset, "shape", ())
    if len(shape) != 2 or dataset.dtype.kind not in "fiu" or rows not in (None, shape[0]):
        expected = "[N, d]" if rows is None else f"[{rows}, d]"
        raise DataError(f"{path}: {name}: expected numbers {expected}, got {dataset.dtype} {list(shape)}")
    if rows is not None and dataset.dtype.kind != "f":
        raise DataError(f"{path}: {name}: expected floating-point features, got {dataset.dtype}")
    return dataset


def _task(path: str, target_names: Any, classes: int) -> TaskSpec:
    if target_names is None:
        return TaskSpec(TASK, "multilabel", classes)
    try:
        found = json.loads(target_names) if isinstance(target_names, str | bytes) else list(target_names)
        labels = tuple(item.decode() if isinstance(item, bytes) else str(item) for item in found)
        return TaskSpec(TASK, "multilabel", classes, labels=labels)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: {TASK}: target_names: expected {classes} names as JSON, got: {error}") from error


def _parts(path: str, split: Any, rows: int) -> dict[str, IntArray] | None:
    """Split -> rows, from the attribute or as published; None where neither says."""
    bounds: dict[str, tuple[int, int]] = {}
    if split is None or getattr(split.dtype, "names", None) is None:
        if rows not in _PUBLISHED:
            return None
        bounds = _PUBLISHED[rows]
    else:
        for entry in split:
            if entry["source"].rstrip(b"\0").decode() == TASK:
                name = entry["split"].rstrip(b"\0").decode()
                if name not in _SPLITS:
                    raise DataError(f"{path}: attribute split: expected train, dev or test, got {name!r}")
                bounds[_SPLITS[name]] = (int(entry["start"]), int(entry["stop"]))
        if "train" not in bounds:
            raise DataError(f"{path}: attribute split: expected rows of {TASK} for train, got none")
        for name, (start, stop) in bounds.items():
            if not 0 <= start <= stop <= rows:
                raise DataError(f"{path}: attribute split: expected rows in 0..{rows} for {name}, got {start}:{stop}")
    return {name: np.arange(*bounds.get(name, (0, 0)), dtype=np.int64) for name in ("train", "val", "test")}


@dataclass(frozen=True, kw_only=True)
class MmimdbSource(BagSource):
    """MM-IMDb's films in the file's own split (rows 0:15552 train, :18160 val, :25959 test of the whole data set).

    Cross-validation does not use that split.

    Attributes:
        views: `text`, `poster`; None for both.
        kinds: specs with fixed classes, as a model's tasks; the genres must be the file's.
        val_share, test_share: of a file that names no split and is not the whole data set.
        class_weights: "balanced" or None.
    """

    views: Sequence[str] | None = None
    kinds: Sequence[TaskSpec] | None = None
    val_share: float = 0.1
    test_share: float = option(0.3, folds=False)
    class_weights: ClassWeights = None

    def open(self, path: str, folds: Folds | None) -> OpenedSource:
        """Raises DataError naming the file and the dataset in it, what was expected and what came."""
        dataset, parts = _open_file(path, self.views, self.kinds)
        return OpenedSource(
            dataset,
            name=Path(path).stem,
            summary=f"{len(dataset)} films of MM-IMDb, {dataset.tasks[0].classes} genres",
            given=[] if parts is None or folds is not None else [GivenSplit(parts, "split as published")],
            keep=[] if self.kinds is None else [TASK],
        )
