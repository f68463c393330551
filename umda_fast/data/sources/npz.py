"""The `.npz` source: packed arrays in one file.

X [N, d]          features; further views as X_<view> [N, d_view]. Without any X: every matrix that is not listed here
                  is a view under its own name.
ptr [B+1]         bag b owns rows ptr[b]:ptr[b+1]; without it every row is a bag of one instance
y [B], y_<task>   labels of one task, [B], or [B, C] for a multilabel one; NaN or blank is missing
Y [B, T]          with `tasks` [T]: one task per column; without: one multilabel task `Y`
mask [N, V]       which views an instance has, columns X first, then the others in the file's order
coords [N, 2]     positions
names [B]         names of the bags
metadata [B, M]   numbers known of the bags, NaN where missing; with `metadata_names` [M], else they are counted
groups [B]        bags of one group (one patient) stay on one side of every split
split [B]         train, val or test
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from umda_fast.data.dataset import BagDataset
from umda_fast.data.event_columns import recognised
from umda_fast.data.labels import ClassWeights, KindOverrides, fixed_tasks
from umda_fast.data.options import option
from umda_fast.data.positive import Positive
from umda_fast.data.sources.base import BagSource, Folds, GivenSplit, OpenedSource
from umda_fast.data.splits import SPLITS, About, parts_of
from umda_fast.errors import DataError

_RESERVED = (
    *("ptr", "y", "Y", "tasks", "mask", "coords", "names", "metadata", "metadata_names", "groups", "split"),
)

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _File:
    dataset: BagDataset
    groups: list[str] | None
    split: list[str] | None


def is_npz(source: str) -> bool:
    """Whether `source` is a file that calls itself .npz or is a zip archive of .npy members."""
    path = Path(source)
    if not path.is_file():
        return False
    if path.suffix == ".npz":
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith(".npy") for member in archive.namelist())


def read_npz(path: str) -> Arrays:
    """All arrays of a file. Pickled objects are refused, because reading them can run code.

    Raises:
        DataError: the file cannot be read, is cut short, or holds objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.lib.npyio.NpzFile):
            with archive:
                return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a readable .npz file of plain arrays, got: {error}") from error
    raise DataError(f"{path}: expected an .npz archive of named arrays, got one .npy array")


def _views(path: str, arrays: Arrays) -> Arrays:
    prefixed = {name.removeprefix("X_"): array for name, array in arrays.items() if name.startswith("X_")}
    if "X" in arrays:
        if "X" in prefixed:
            raise DataError(f"{path}: X_X: expected another name, the view of the array X is called X")
        return {"X": arrays["X"], **prefixed}
    if prefixed:
        return prefixed
    return {name: array for name, array in arrays.items() if not _is_reserved(name) and array.ndim == 2}


def _is_reserved(name: str) -> bool:
    return name in _RESERVED or name.startswith("y_")


def _check_keys(path: str, arrays: Arrays, views: Arrays) -> None:
    if not views:
        raise DataError(
            f"{path}: X: expected the features [N, d] as X, as X_<view>, or as matrices of any name; "
            f"got only {', '.join(arrays) or 'no array'}"
        )
    strange = [
        name
        for name in arrays
        if not _is_reserved(name) and name not in views and name.removeprefix("X_") not in views
    ]
    if strange:
        raise DataError(
            f"{path}: {strange[0]}: an array of unknown meaning, shape {list(arrays[strange[0]].shape)}; "
            f"expected X, X_<view>, y_<task>, {', '.join(_RESERVED)} (the option ignore leaves it out)"
        )


def _labels(path: str, arrays: Arrays, kinds: KindOverrides | None) -> tuple[Arrays, KindOverrides | None]:
    """The labels of every task, and the kinds with the names of Y's columns where Y is one task."""
    labels = {"y": arrays["y"]} if "y" in arrays else {}
    labels |= {name.removeprefix("y_"): array for name, array in arrays.items() if name.startswith("y_")}
    if "Y" not in arrays:
        if "tasks" in arrays:
            raise DataError(f"{path}: tasks: expected beside Y [B, T], whose columns it names; there is no Y")
        return labels, kinds
    matrix = arrays["Y"]
    if matrix.ndim != 2:
        raise DataError(f"{path}: Y: expected [B, T], got {list(matrix.shape)}; one task is called y")
    if "tasks" not in arrays:
        return {**labels, "Y": matrix}, kinds
    names = _strings(path, "tasks", arrays["tasks"], matrix.shape[1], "column of Y")
    if "Y" in _names(kinds):
        if isinstance(kinds, Mapping) and kinds["Y"] == "multilabel":
            kinds = {**kinds, "Y": {"kind": "multilabel", "classes": len(names), "labels": names}}
        return {**labels, "Y": matrix}, kinds
    return {**labels, **{name: matrix[:, column] for column, name in enumerate(names)}}, kinds


def _names(kinds: KindOverrides | None) -> list[str]:
    return list(kinds) if isinstance(kinds, Mapping) else [spec.name for spec in kinds or ()]


def _strings(path: str, key: str, array: npt.NDArray[Any], expected: int, what: str) -> list[str]:
    if array.shape != (expected,):
        raise DataError(f"{path}: {key}: expected [{expected}], one for each {what}, got {list(array.shape)}")
    return [item.decode() if isinstance(item, bytes) else str(item).strip() for item in array.tolist()]


def _metadata(path: str, arrays: Arrays) -> Arrays:
    if "metadata" not in arrays:
        if "metadata_names" in arrays:
            raise DataError(f"{path}: metadata_names: expected beside metadata [B, M], whose columns it names")
        return {}
    matrix = arrays["metadata"]
    if matrix.ndim != 2:
        raise DataError(f"{path}: metadata: expected [B, M], got {list(matrix.shape)}")
    names = [f"metadata {column}" for column in range(matrix.shape[1])]
    if "metadata_names" in arrays:
        names = _strings(path, "metadata_names", arrays["metadata_names"], matrix.shape[1], "column of metadata")
    return {name: matrix[:, column] for column, name in enumerate(names)}


def open_npz(
    path: str, kinds: KindOverrides | None = None, ignore: Sequence[str] = (), positive: Positive | None = None
) -> _File:
    arrays = read_npz(path)
    unknown = [name for name in ignore if name not in arrays]
    if unknown:
        raise DataError(f"{path}: ignore: expected names among {', '.join(arrays)}, got {unknown[0]!r}")
    for name in ignore:
        del arrays[name]
    views = _views(path, arrays)
    _check_keys(path, arrays, views)
    ptr = arrays.get("ptr")
    bags = len(next(iter(views.values()))) if ptr is None else len(ptr) - 1

    def strings(key: str) -> list[str] | None:
        return _strings(path, key, arrays[key], bags, "bag") if key in arrays else None

    labels, kinds = _labels(path, arrays, kinds)
    if ptr is None:
        for name, array in labels.items():
            if len(array) != bags:
                raise DataError(
                    f"{path}: labels {name!r}: expected {bags}, one for each row of the features, "
                    f"got {len(array)}; bags of several rows need ptr [B+1]"
                )
    dataset = BagDataset.from_arrays(
        views,
        ptr,
        labels,
        mask=arrays.get("mask"),
        coords=arrays.get("coords"),
        metadata=_metadata(path, arrays),
        kinds=kinds,
        positive=positive,
        names=strings("names"),
        name=path,
    )
    split = strings("split")
    for row, value in enumerate(split or ()):
        if value not in SPLITS:
            raise DataError(
                f"{path}: split: expected one of {', '.join(SPLITS)} for every bag, "
                f"got {value!r} for {dataset.names[row]!r}"
            )
    return _File(dataset, strings("groups"), split)


@dataclass(frozen=True, kw_only=True)
class NpzSource(BagSource):
    """Bags from an `.npz` file, split as its `split` array says or else at random.

    With a `split` array that has no val, bags are taken from train for it; one without test leaves test empty.
    Cross-validation does not use it.

    Attributes:
        kinds: as in `BagDataset.from_arrays`; {"Y": "multilabel"} makes the columns of Y one task.
        positive: as there.
        val_share, test_share: of the bags.
        class_weights: "balanced" or None.
        ignore: arrays of the file to leave out.
    """

    kinds: KindOverrides | None = None
    positive: Positive | None = None
    val_share: float = 0.15
    test_share: float = option(0.2, folds=False)
    class_weights: ClassWeights = None
    ignore: Sequence[str] = ()

    def describe(self, opened: OpenedSource, how: str) -> str:
        """What the file holds."""
        return opened.summary

    def open(self, path: str, folds: Folds | None) -> OpenedSource:
        """Raises DataError naming the file and the array, what was expected and what came."""
        file = open_npz(path, self.kinds, self.ignore, self.positive)
        dataset, given = file.dataset, []
        if file.split is not None and folds is None:
            given = [GivenSplit(parts_of(file.split), "split as the file says")]
        size = f"{len(dataset)} bags, {int(dataset.sizes.sum())} instances"
        return OpenedSource(
            dataset,
            name=Path(path).stem,
            summary=f"{size}, {len(dataset.views)} view(s), {len(dataset.tasks)} task(s)",
            groups=file.groups,
            given=given,
            keep=fixed_tasks(self.kinds),
            about=About(notes=recognised(dataset.tasks, _names(self.kinds))),
        )
