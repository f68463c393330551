"""One file of instances: HDF5 as CLAM, TRIDENT and STAMP write it, `.pt`, `.npz`; header first, content later.

What the tools write (read from their sources, 2026; the tests write files in the same way):

CLAM     `extract_features_fp.py`, `utils/file_utils.py`: `h5_files/<slide>.h5` with `features` float32 [N, D] and
         `coords` int32 [N, 2] in level-0 pixels, both resizable, grown batch by batch, chunks of 32 rows, no
         attribute; `pt_files/<slide>.pt`, the same features as a tensor.
TRIDENT  `trident/IO.py`, `wsi_objects/WSI.py`: `features` (attributes `encoder`, `name`, `savetodir`) and `coords`
         int64 [N, 2] in level-0 pixels (attributes `patch_size`, `patch_size_level0`, `level0_magnification`,
         `target_magnification`, `overlap`, ...), resizable, chunks of one row; a slide without tissue has features of
         shape (0,) or (0, D).
STAMP    `preprocessing/__init__.py`, `modeling/data.py`: `feats` float16 [N, D] and `coords` float32 [N, 2] in
         micrometres, contiguous; attributes of the file: `unit` "um", `tile_size_um` (2.0: `tile_size`),
         `tile_size_px`, `extractor`, `stamp_version`, ... Before 2.0 the unit was 224 pixels to 256 micrometres.
.pt      a tensor [N, D], or a mapping with `features` (or `feats`) and perhaps `coords`, `unit`, `patch_size`, `mpp`.
.npz     the same names as arrays.
"""

from __future__ import annotations

import math
import os
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.data.arrays import FloatArray, IntArray, all_finite
from umda_fast.errors import DataError

Unit: TypeAlias = Literal["um", "px"]
Array: TypeAlias = npt.NDArray[Any]

SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".npz")
_FEATURES = ("features", "feats", "patch_embeddings")
_UNITS: dict[str, Unit] = {
    "um": "um",
    "µm": "um",
    "μm": "um",
    "micron": "um",
    "microns": "um",
    "micrometer": "um",
    "micrometre": "um",
    "px": "px",
    "pixel": "px",
    "pixels": "px",
    "level0": "px",
}
_STAMP_TILE_PX, _STAMP_TILE_UM = 224, 256.0  # before version 2.0, with no other size possible
_LARGEST_UM = 250_000.0  # no slide is wider than 25 cm
_PIXEL_SIZES = (0.01, 100.0)  # micrometres; whole-slide scanners make 0.1 to 4, thumbnails up to tens
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class BagFile:
    """What the header of a file says.

    Attributes:
        path: of the file; its stem is the bag's name.
        tool: who wrote it, for messages.
        rows: instances.
        width: of the features; None in an empty file that does not say.
        dtype: of the features as stored.
        unit: of the coordinates after `scale`; None without coordinates.
        scale: what stored coordinates are multiplied by.
        patch_size: edge of a patch in `unit`, NaN if not known.
        step: distance of neighbouring patches in `unit`, NaN if not known.
        pixel_size: micrometres per level-0 pixel, NaN if not known.
        encoder: what made the features, if the file says.
        probe: of the content; equal for equal features, seldom equal for others.
    """

    path: Path
    tool: str
    rows: int
    width: int | None
    dtype: torch.dtype
    unit: Unit | None
    scale: float
    patch_size: float
    step: float
    pixel_size: float
    encoder: str | None
    probe: tuple[object, ...]


def read_header(path: Path) -> BagFile:
    """What a file holds, from its header and its first row.

    Raises:
        DataError: naming the file, when it cannot be read or holds no instances.
    """
    return _READERS[path.suffix.lower()][0](path)


def read_bag(file: BagFile) -> tuple[Tensor, FloatArray | None]:
    """Features [n, D] in their stored dtype, and coordinates float64 [n, 2] in the file's unit.

    Raises:
        DataError: naming the file: unreadable, changed since its header was read, values that are not finite,
            coordinates that cannot be in their unit.
    """
    features, stored = _READERS[file.path.suffix.lower()][1](file, True)
    assert features is not None
    coords = None if stored is None else _checked_coords(file, stored)
    if file.width is None:
        features = features.reshape(0, 0)
    if not all_finite(features):
        rows = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
        row = int(rows[0])
        column = int((~torch.isfinite(features[row])).nonzero()[0])
        raise DataError(
            f"{file.path}: features: expected finite numbers, got {float(features[row, column])} at row {row}, "
            f"column {column} ({len(rows)} such rows)"
        )
    return features, coords


def read_coords(file: BagFile) -> FloatArray | None:
    """Coordinates float64 [n, 2] in the file's unit, without the features. Raises as `read_bag`."""
    if file.unit is None:
        return None
    _, stored = _READERS[file.path.suffix.lower()][1](file, False)
    return None if stored is None else _checked_coords(file, stored)


def _check_unchanged(file: BagFile, rows: int, width: int | None, dtype: torch.dtype, located: bool) -> None:
    if (rows, width, dtype, located) != (file.rows, file.width, file.dtype, file.unit is not None):
        raise DataError(
            f"{file.path}: changed while in use: expected {file.rows} rows of width {file.width}, got {rows} of {width}"
        )


def check_pixel_size(where: str, value: object) -> float:
    """Micrometres per level-0 pixel as a float.

    Raises:
        DataError: no number, or none that a slide could have.
    """
    low, high = _PIXEL_SIZES
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise DataError(f"{where}: expected micrometres per pixel in {low:g}..{high:g}, got {value!r}")
    return number


# ---- coordinates ----


def _checked_coords(file: BagFile, stored: Array) -> FloatArray:
    where = f"{file.path}: coords"
    with np.errstate(invalid="ignore"):  # of a NaN that signals; said below with its place
        coords: FloatArray = stored.astype(np.float64)
    if not np.isfinite(coords).all():
        row = int(np.flatnonzero(~np.isfinite(coords).all(axis=1))[0])
        raise DataError(f"{where}: expected finite numbers, got {coords[row].tolist()} at row {row}")
    if file.unit == "px":
        if stored.dtype.kind == "f" and not (coords == np.floor(coords)).all():
            row = int(np.flatnonzero((coords != np.floor(coords)).any(axis=1))[0])
            raise DataError(
                f"{where}: wrong unit: expected whole level-0 pixels, got {coords[row].tolist()} at row {row}; "
                "coordinates in micrometres need the attribute unit = 'um'"
            )
        return coords
    coords = coords * file.scale
    if len(coords) and np.abs(coords).max() > _LARGEST_UM:
        raise DataError(
            f"{where}: wrong unit: expected micrometres, got {np.abs(coords).max():.0f}, "
            "which is wider than any slide; are these pixels?"
        )
    return coords


def check_step(file: BagFile, coords: FloatArray) -> None:
    """Raise DataError if patches lie closer together than the file's own patch size and overlap allow.

    Coordinates of another level than 0, or in another unit than the file says, are found by this.
    """
    if math.isnan(file.step) or len(coords) < 2:
        return
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    gaps = np.diff(coords[order], axis=0)
    along = gaps[(gaps[:, 1] == 0) & (gaps[:, 0] > 0), 0]
    if len(along) and along.min() < 0.75 * file.step:
        raise DataError(
            f"{file.path}: coords: wrong unit: expected patches at least {file.step:g} {file.unit} apart, as patch "
            f"size and overlap say, got {along.min():g}; are these coordinates of another level or unit?"
        )


def _unit(path: Path, given: object) -> Unit:
    """The unit named by a file, or level-0 pixels."""
    if given is None:
        return "px"
    text = given.decode() if isinstance(given, bytes) else str(given)
    unit = _UNITS.get(text.strip().lower())
    if unit is None:
        raise DataError(f"{path}: wrong unit: expected um or px, got {text!r}")
    return unit


def _check_shapes(path: Path, features: tuple[int, ...], coords: tuple[int, ...] | None) -> tuple[int, int | None]:
    """Rows and width."""
    if features == (0,):
        rows, width = 0, None
    elif len(features) == 2 and features[1] > 0:
        rows, width = features
    else:
        raise DataError(f"{path}: features: expected [N, D], got {list(features)}")
    if coords is not None and coords != (rows, 2) and not (rows == 0 and coords == (0,)):
        raise DataError(f"{path}: coords: expected [{rows}, 2], one row for each of the features, got {list(coords)}")
    return rows, width


def _torch_dtype(path: Path, dtype: np.dtype[Any]) -> torch.dtype:
    known = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
    if dtype.name not in known:
        raise DataError(f"{path}: features: expected float16, float32 or float64, got {dtype}")
    return known[dtype.name]


def _probe(rows: int, width: int | None, dtype: torch.dtype, first: bytes) -> tuple[object, ...]:
    return rows, width, dtype, first if rows else b""


def _number(value: object) -> float:
    """A finite positive number, or NaN: TRIDENT writes None as text."""
    try:
        number = float(np.asarray(value).reshape(()).item() if not isinstance(value, str | bytes) else value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) and number > 0 else math.nan


def _pixel_size(path: Path, *places: Mapping[str, Any]) -> float:
    for place in places:
        for name in ("mpp", "level0_mpp", "slide_mpp", "mpp_x"):
            if name in place and not math.isnan(_number(place[name])):
                return check_pixel_size(f"{path}: {name}", _number(place[name]))
    return math.nan


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value if isinstance(value, str) and value not in ("", "None") else None


# ---- HDF5 ----


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    import h5py

    try:
        # Opened for one read and closed: nothing is shared with forked workers, and never more than one is open.
        # Read-only file systems without locks are no reason to fail.
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # of corrupt files h5py raises whatever its conversions meet
        raise DataError(f"{path}: corrupt or truncated: expected a readable HDF5 file, got: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@dataclass(frozen=True)
class _HDF5:
    """An open file: the data sets, `features` being called `name`, and what their shapes say."""

    file: Any
    name: str
    features: Any
    coords: Any
    rows: int
    width: int | None
    dtype: torch.dtype


@contextmanager
def _open_hdf5(path: Path) -> Iterator[_HDF5]:
    import h5py

    with _hdf5(path) as file:
        name = next((name for name in _FEATURES if isinstance(file.get(name), h5py.Dataset)), None)
        if name is None:
            raise DataError(
                f"{path}: expected features [N, D] under the name {', '.join(_FEATURES)}, "
                f"got {', '.join(map(str, file)) or 'nothing'}"
            )
        features, coords = file[name], file.get("coords")
        if coords is not None and not isinstance(coords, h5py.Dataset):
            raise DataError(f"{path}: coords: expected numbers [N, 2], got a group")
        rows, width = _check_shapes(path, features.shape, None if coords is None else coords.shape)
        yield _HDF5(file, name, features, coords, rows, width, _torch_dtype(path, features.dtype))


def _hdf5_header(path: Path) -> BagFile:
    with _open_hdf5(path) as opened:
        first = opened.features[0].tobytes() if opened.rows else b""
        return BagFile(
            path=path,
            rows=opened.rows,
            width=opened.width,
            dtype=opened.dtype,
            probe=_probe(opened.rows, opened.width, opened.dtype, first),
            **_hdf5_place(path, opened),
        )


def _hdf5_content(file: BagFile, features: bool) -> tuple[Tensor | None, Array | None]:
    with _open_hdf5(file.path) as opened:
        _check_unchanged(file, opened.rows, opened.width, opened.dtype, opened.coords is not None)
        content = torch.from_numpy(_rows(file.path, opened.features)) if features else None
        stored = None if opened.coords is None else _rows(file.path, opened.coords).reshape(file.rows, 2)
        return content, stored


def _hdf5_place(path: Path, opened: _HDF5) -> dict[str, Any]:
    """Who wrote the file, and everything about its coordinates."""
    top, coords = opened.file.attrs, opened.coords
    at: Mapping[str, Any] = {} if coords is None else coords.attrs
    encoder = _text(opened.features.attrs.get("encoder")) or _text(top.get("extractor")) or _text(top.get("encoder"))
    kind = _text(top.get("feat_type"))
    if kind in ("slide", "patient"):
        raise DataError(f"{path}: expected features of tiles, got features of a whole {kind}")
    pixel_size = _pixel_size(path, at, top)
    plain: dict[str, Any] = {"encoder": encoder, "pixel_size": pixel_size, "scale": 1.0}
    nothing = {"patch_size": math.nan, "step": math.nan}
    if opened.name == "feats":
        if coords is None:
            return {**plain, **nothing, "tool": "STAMP", "unit": None}
        return {**plain, **_stamp_place(path, top, coords), "tool": "STAMP", "unit": "um"}
    if "patch_size_level0" in at:
        size, overlap = _number(at["patch_size_level0"]), _number(at.get("overlap", 0))
        down = _number(at.get("level0_magnification")) / _number(at.get("target_magnification"))
        step = size - (0.0 if math.isnan(overlap) else overlap * down)
        return {**plain, "tool": "TRIDENT", "unit": "px", "patch_size": size, "step": step if step > 0 else math.nan}
    clam = coords is not None and coords.maxshape[0] is None
    tool = "CLAM" if clam else "HDF5"
    if coords is None:
        return {**plain, **nothing, "tool": tool, "unit": None}
    unit = _unit(path, at.get("unit", top.get("unit")))
    size = _number(at.get("patch_size", top.get("patch_size")))
    return {**plain, "tool": tool, "unit": unit, "patch_size": size, "step": math.nan}


def _stamp_place(path: Path, attributes: Mapping[str, Any], coords: Any) -> dict[str, Any]:
    unit, size = _text(attributes.get("unit")), _number(attributes.get("tile_size_um"))
    if math.isnan(size) and unit == "um":
        size = _number(attributes.get("tile_size"))  # 2.0
    if not math.isnan(size) and unit in ("um", None):
        return {"scale": 1.0, "patch_size": size, "step": size}
    stride = _number(attributes.get("tile_size")) if unit != "um" else math.nan
    if math.isnan(stride) and unit in ("px", None) and len(coords) > 1:
        gaps = [np.diff(np.unique(column)) for column in _rows(path, coords).astype(np.float64).T]
        stride = min((float(gap.min()) for gap in gaps if len(gap)), default=math.nan)
    if unit in ("px", None) and not math.isnan(stride) and round(stride) == _STAMP_TILE_PX:
        scale = _STAMP_TILE_UM / _STAMP_TILE_PX
        return {"scale": scale, "patch_size": _STAMP_TILE_UM, "step": _STAMP_TILE_UM}
    if unit == "um":
        return {"scale": 1.0, "patch_size": math.nan, "step": math.nan}
    raise DataError(
        f"{path}: wrong unit: expected coordinates in micrometres (attributes unit = 'um' and tile_size_um), or 224 "
        f"pixels apart as STAMP wrote them before 2.0, got unit {unit or 'none'}, distance {stride:g}"
    )


def _rows(path: Path, dataset: Any) -> Array:
    """All of an HDF5 dataset, in native byte order.

    HDF5 looks up every chunk by itself, which for chunks of one row takes far longer than reading them. Chunks that
    are stored as they are (no filter) lie where the index says, mostly one behind the other: their places are asked
    for once, and runs of neighbours are read in one go. `bench/bench_pack.py` measures it.
    """
    places = _chunk_places(dataset)
    if places is None:
        content: Array = dataset[()]
        return content if content.dtype.isnative else content.astype(content.dtype.newbyteorder("="))
    first, offsets = places
    rows, chunk = dataset.shape[0], dataset.chunks[0]
    content = np.empty(dataset.shape, dataset.dtype)
    row_bytes = content.nbytes // rows
    counts = np.minimum(chunk, rows - first)
    breaks = np.flatnonzero((np.diff(offsets) != chunk * row_bytes) | (np.diff(first) != chunk)) + 1
    flat = content.reshape(-1).view(np.uint8).data
    with open(path, "rb", buffering=0) as raw:
        for start, stop in zip([0, *breaks], [*breaks, len(first)], strict=True):
            begin = int(first[start]) * row_bytes
            end = (int(first[stop - 1]) + int(counts[stop - 1])) * row_bytes
            _read_exactly(path, raw.fileno(), flat[begin:end], int(offsets[start]))
    return content


def _read_exactly(path: Path, descriptor: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise DataError(f"{path}: truncated: expected data up to byte {offset + len(into)}")
        done += count


def _chunk_places(dataset: Any) -> tuple[IntArray, IntArray] | None:
    """First row and file offset of every chunk, by row; None where HDF5 has to read it."""
    if (
        dataset.chunks is None
        or len(dataset) == 0
        or dataset.chunks[1:] != dataset.shape[1:]
        or not dataset.dtype.isnative
        or not hasattr(os, "preadv")
        or not hasattr(dataset.id, "chunk_iter")
        or dataset.id.get_create_plist().get_nfilters()
        or dataset.file.id.get_create_plist().get_userblock()
    ):
        return None
    # Numbers only: as many objects as chunks, kept, would have the garbage collector look at everything there is.
    rows, bytes_ = array("q"), array("q")

    def note(place: Any) -> None:
        rows.append(place.chunk_offset[0])
        bytes_.append(place.byte_offset)

    dataset.id.chunk_iter(note)
    first, offsets = np.frombuffer(rows, np.int64), np.frombuffer(bytes_, np.int64)
    order = np.argsort(first, kind="stable")
    first, offsets = first[order], offsets[order]
    whole = np.arange(0, len(dataset), dataset.chunks[0])  # a chunk never written has no place
    return (first, offsets) if np.array_equal(first, whole) else None


# ---- .pt ----


def _open_pt(path: Path, mapped: bool) -> tuple[Mapping[str, Any], Tensor, Array | None, int, int | None]:
    """The mapping, its features and coordinates, rows and width. Mapped into memory, features are not read."""
    content = _load_pt(path, mapped)
    named: Mapping[str, Any] = content if isinstance(content, Mapping) else {"features": content}
    found = [name for name in _FEATURES if isinstance(named.get(name), Tensor)]
    if not found:
        came = f"a mapping with {', '.join(map(str, named))}" if named is content else type(content).__name__
        raise DataError(f"{path}: expected a tensor [N, D] or a mapping with features and coords, got {came}")
    features: Tensor = named[found[0]].detach()
    if features.dtype not in _DTYPES or features.is_sparse:
        raise DataError(f"{path}: features: expected floating-point numbers, got {features.dtype}")
    coords = named.get("coords")
    if coords is not None and not isinstance(coords, Tensor):
        raise DataError(f"{path}: coords: expected a tensor [N, 2], got {type(coords).__name__}")
    stored = None if coords is None else coords.detach().numpy()
    rows, width = _check_shapes(path, tuple(features.shape), None if stored is None else stored.shape)
    return named, features, None if stored is None else stored.reshape(rows, 2), rows, width


def _pt_header(path: Path) -> BagFile:
    named, features, stored, rows, width = _open_pt(path, mapped=True)
    first = features[0].contiguous().view(torch.uint8).numpy().tobytes() if rows else b""
    return _plain_header(path, ".pt", rows, width, features.dtype, first, stored, named)


def _pt_content(file: BagFile, features: bool) -> tuple[Tensor | None, Array | None]:
    # Read, not mapped: a file that is cut short later must not end the process.
    _, content, stored, rows, width = _open_pt(file.path, mapped=not features)
    _check_unchanged(file, rows, width, content.dtype, stored is not None)
    return content if features else None, stored


def _load_pt(path: Path, mapped: bool) -> Any:
    try:
        if mapped and zipfile.is_zipfile(path):  # the format before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the unpickler meets
        raise DataError(
            f"{path}: corrupt, truncated or not plain tensors: expected what torch.load reads with weights_only=True, "
            f"got: {_line(error)}"
        ) from error


def _plain_header(
    path: Path,
    tool: str,
    rows: int,
    width: int | None,
    dtype: torch.dtype,
    first: bytes,
    coords: Array | None,
    named: Mapping[str, Any],
) -> BagFile:
    if coords is not None and coords.dtype.kind not in "fiu":
        raise DataError(f"{path}: coords: expected numbers, got {coords.dtype}")

    def scalar(name: str) -> Any:
        value = named.get(name)
        if not isinstance(value, Tensor | np.ndarray):
            return value
        array = np.asarray(value)
        return array.item() if array.size == 1 else None

    return BagFile(
        path=path,
        tool=tool,
        rows=rows,
        width=width,
        dtype=dtype,
        unit=None if coords is None else _unit(path, scalar("unit")),
        scale=1.0,
        patch_size=_number(scalar("patch_size")),
        step=math.nan,
        pixel_size=_pixel_size(path, {"mpp": scalar("mpp")}),
        encoder=_text(scalar("encoder")),
        probe=_probe(rows, width, dtype, first),
    )


# ---- .npz ----


@contextmanager
def _npz(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, str]]]:
    """The archive, and name -> member of every array."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
            if "ptr" in members:
                raise DataError(f"{path}: expected one bag, got a whole data set (it has ptr); give the file as SOURCE")
            yield archive, members
    except DataError:
        raise
    except Exception as error:  # of corrupt files zipfile and numpy's parser of headers raise many kinds
        raise DataError(
            f"{path}: corrupt or truncated: expected a readable .npz file of plain arrays, got: {_line(error)}"
        ) from error


def _npz_header(path: Path) -> BagFile:
    with _npz(path) as (archive, members):
        with archive.open(members[_npz_features(path, archive, members)]) as member:
            shape, fortran, kind = _npy_header(member)
            first = b"" if fortran or len(shape) != 2 else member.read(shape[1] * kind.itemsize)
        small = [name for name in ("coords", "unit", "patch_size", "mpp", "encoder") if name in members]
        named: dict[str, Any] = {name: _member(archive, members[name]) for name in small}
    stored = named.get("coords")
    rows, width = _check_shapes(path, shape, None if stored is None else stored.shape)
    return _plain_header(path, ".npz", rows, width, _torch_dtype(path, kind), first, stored, named)


def _npz_content(file: BagFile, features: bool) -> tuple[Tensor | None, Array | None]:
    content = stored = None
    with _npz(file.path) as (archive, members):
        if features:
            content = _member(archive, members[_npz_features(file.path, archive, members)])
        if "coords" in members:
            stored = _member(archive, members["coords"])
    if content is not None:
        rows, width = _check_shapes(file.path, content.shape, None if stored is None else stored.shape)
        _check_unchanged(file, rows, width, _torch_dtype(file.path, content.dtype), stored is not None)
        content = np.ascontiguousarray(content, content.dtype.newbyteorder("="))
    if stored is not None and stored.size != 2 * file.rows:
        raise DataError(f"{file.path}: changed while in use: expected {file.rows} coordinates, got {stored.size // 2}")
    return (
        None if content is None else torch.from_numpy(content),
        None if stored is None else stored.reshape(file.rows, 2),
    )


def _npz_features(path: Path, archive: zipfile.ZipFile, members: Mapping[str, str]) -> str:
    """The member that holds the features: by name, or the only matrix beside `coords`."""
    named = [name for name in (*_FEATURES, "X") if name in members]
    if not named:
        for name in members:
            with archive.open(members[name]) as member:
                if name != "coords" and len(_npy_header(member)[0]) == 2:
                    named.append(name)
        if len(named) > 1:
            named = []
    if not named:
        raise DataError(f"{path}: expected features [N, D] and, if there, coords [N, 2], got {', '.join(members)}")
    return named[0]


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(member)
    return shape, fortran, kind


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
        return array


_Header: TypeAlias = Callable[[Path], BagFile]
_Content: TypeAlias = Callable[[BagFile, bool], tuple[Tensor | None, Array | None]]
_READERS: dict[str, tuple[_Header, _Content]] = {
    ".h5": (_hdf5_header, _hdf5_content),
    ".hdf5": (_hdf5_header, _hdf5_content),
    ".pt": (_pt_header, _pt_content),
    ".pth": (_pt_header, _pt_content),
    ".npz": (_npz_header, _npz_content),
}
