"""Where a model looked: heatmaps, GeoJSON for QuPath, and the instances with the most attention."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from umda_fast import ops
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.files import atomic_file
from umda_fast.studies.patches import commonest_step, neighbour_steps, patch_sizes
from umda_fast.studies.predict import mixed_note, predict_batches
from umda_fast.train.chosen import tell
from umda_fast.train.data import model_data
from umda_fast.train.loading import Run

__all__ = ["BagMap", "Explanation", "attention_maps", "explain", "paint", "plot_maps", "write_geojson"]

FloatArray = npt.NDArray[np.floating[Any]]

_CELLS = 1200  # along the longer side of a heatmap


@dataclass(frozen=True)
class BagMap:
    """What is known of one bag's n instances.

    Attributes:
        name: of the bag.
        attention: float32 [n, T]; sums to 1 over the instances.
        views: float32 [n, V], the weight of every view in the fusion, or None for a model of one view.
        coords: [n, 2], corner of each patch with the smallest x and y, NaN for an instance of the whole slide, or None.
        unit: of the coordinates: "px" (level 0), "um", or "" where not known.
        patch: edge of a patch in that unit, NaN where not known. guessed: from the distances between patches.
        pixel_size: micrometres per level-0 pixel, NaN where not known.
        slide: of a bag of several slides the one that this is of, with its n instances alone.
        total: instances of the whole bag; None: n.
    """

    name: str
    attention: FloatArray
    views: FloatArray | None
    coords: FloatArray | None
    unit: str = ""
    patch: float = float("nan")
    pixel_size: float = float("nan")
    guessed: bool = False
    slide: str = ""
    total: int | None = None

    @property
    def relative(self) -> FloatArray:
        """Attention times the number of the bag's instances: 1 is what each would have if all were alike."""
        return self.attention * (len(self.attention) if self.total is None else self.total)

    @property
    def placed(self) -> BagMap:
        """The instances that have a place; one of the whole slide has none."""
        if self.coords is None or np.isfinite(self.coords).all():
            return self
        keep = np.isfinite(self.coords).all(axis=1)
        total = len(self.attention) if self.total is None else self.total
        views = None if self.views is None else self.views[keep]
        return replace(self, attention=self.attention[keep], views=views, coords=self.coords[keep], total=total)

    @property
    def title(self) -> str:
        """The bag, and the slide of it."""
        return f"{self.name}, slide {self.slide}" if self.slide else self.name

    @property
    def edge(self) -> float:
        """Of a patch as it is drawn: `patch`, or else the commonest distance between neighbouring ones.

        Raises:
            DataError: no two patches lie in one row or column, so that nothing can be told.
        """
        assert self.coords is not None
        edge = self.patch if np.isfinite(self.patch) else commonest_step(neighbour_steps(self.coords))[0]
        if not np.isfinite(edge):
            raise DataError(f"bag {self.name!r}: expected the size of a patch; the coordinates do not tell it")
        return edge


def paint(coords: FloatArray, values: FloatArray, edge: float, cells: int = _CELLS) -> tuple[FloatArray, float]:
    """Patches as a picture: every cell holds the mean of the patches that cover it, NaN where none does.

    Args:
        coords: [n, 2], n > 0, corner of each patch with the smallest x and y.
        values: [n].
        edge: of the patches, in the coordinates' unit.
        cells: most cells along the longer side.

    Returns:
        The picture [rows, columns], row 0 at the smallest y, and the edge of a cell.
    """
    low = coords.min(axis=0)
    extent = coords.max(axis=0) - low + edge
    cell = max(float(extent.max()) / cells, edge / 4)
    shape = np.maximum(np.ceil(extent / cell - 1e-9).astype(np.int64), 1)
    first = np.floor((coords - low) / cell + 1e-9).astype(np.int64)
    last = np.maximum(np.ceil((coords - low + edge) / cell - 1e-9).astype(np.int64), first + 1)
    total, count = np.zeros(shape[::-1]), np.zeros(shape[::-1])
    span = int((last - first).max())
    for dy in range(span):
        for dx in range(span):
            at = first + np.array([dx, dy])
            inside = (at < np.minimum(last, shape)).all(axis=1)
            where = (at[inside, 1], at[inside, 0])
            np.add.at(total, where, values[inside])
            np.add.at(count, where, 1.0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0), cell


def plot_maps(
    bag: BagMap, panels: Mapping[str, FloatArray], title: str, label: str, low: float | None = None
) -> Figure:
    """One heatmap per panel, side by side, on a common colour scale up to the 99th percentile.

    Args:
        bag: with coordinates.
        panels: heading -> values [n].
        title: of the figure. label: of the colour bar. low: bottom of the scale; None for the least value.
    """
    assert bag.coords is not None
    edge = bag.edge
    painted = {name: paint(bag.coords, values, edge) for name, values in panels.items()}
    values = np.concatenate(list(panels.values()))
    high = float(np.quantile(values, 0.99))
    bottom = float(values.min()) if low is None else low
    rows, columns = next(iter(painted.values()))[0].shape
    side = 4.6
    height = min(max(side * rows / columns, 1.5), 2 * side)
    figure = Figure(figsize=(side * len(panels) + 1.2, height + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    corner = bag.coords.min(axis=0)
    for axis, (name, (picture, cell)) in zip(axes, painted.items(), strict=True):
        extent = (corner[0], corner[0] + columns * cell, corner[1] + rows * cell, corner[1])  # y grows downwards
        image = axis.imshow(
            picture, vmin=bottom, vmax=max(high, bottom + 1e-12), cmap="inferno", extent=extent, interpolation="nearest"
        )
        axis.set_facecolor("0.92")
        unit = {"um": "µm", "px": "pixels"}.get(bag.unit, "")
        axis.set(title=name, xlabel=f"x ({unit})" if unit else "x", ylabel=f"y ({unit})" if unit else "y")
        axis.tick_params(labelsize=7)
        axis.ticklabel_format(style="plain", useOffset=False)
    figure.colorbar(image, ax=list(axes), label=label, shrink=0.85, extend="max" if high < values.max() else "neither")
    figure.suptitle(f"{title} (size of patches guessed)" if bag.guessed else title)
    return figure


def _to_pixels(bag: BagMap) -> tuple[FloatArray, float]:
    assert bag.coords is not None
    edge = bag.edge
    if bag.unit != "um":
        return bag.coords, edge
    if not np.isfinite(bag.pixel_size):
        raise DataError(
            f"bag {bag.name!r}: coordinates are in micrometres; QuPath counts in pixels, expected the pixel size"
        )
    return bag.coords / bag.pixel_size, edge / bag.pixel_size


def write_geojson(path: str | os.PathLike[str], bag: BagMap, tasks: Sequence[str], views: Sequence[str] = ()) -> None:
    """One tile per instance, a GeoJSON FeatureCollection that QuPath (0.4 or newer) opens with File > Import objects.

    Measurements of a tile: `attention: <task>` times the number of instances, `percentile: <task>` and, with several
    views, `view: <view>`. The geometry is in level-0 pixels, as QuPath counts.

    Args:
        path: of the file, written whole or not at all.
        bag: with coordinates.
        tasks: names of the columns of its attention. views: of its view weights.

    Raises:
        DataError: coordinates in micrometres and no pixel size.
    """
    corners, edge = _to_pixels(bag)
    with atomic_file(path) as stream:
        stream.write(b'{"type":"FeatureCollection","features":[')
        for number, feature in enumerate(_features(bag, corners, edge, tasks, views)):
            stream.write(b",\n" if number else b"\n")
            stream.write(json.dumps(feature, separators=(",", ":")).encode())
        stream.write(b"\n]}\n")


def _features(
    bag: BagMap, corners: FloatArray, edge: float, tasks: Sequence[str], views: Sequence[str]
) -> Iterator[dict[str, Any]]:
    columns = {f"attention: {task}": bag.relative[:, t] for t, task in enumerate(tasks)}
    n = len(corners)
    for t, task in enumerate(tasks):
        percentile = np.empty(n)
        percentile[bag.attention[:, t].argsort(kind="stable")] = 100 * np.arange(1, n + 1) / n
        columns[f"percentile: {task}"] = percentile
    if bag.views is not None:
        columns |= {f"view: {view}": bag.views[:, v] for v, view in enumerate(views)}
    for i in range(n):
        x, y = (round(float(value), 2) for value in corners[i])
        right, bottom = round(x + edge, 2), round(y + edge, 2)
        yield {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]],
            },
            "properties": {
                "objectType": "tile",
                "measurements": {name: float(f"{values[i]:.5g}") for name, values in columns.items()},
            },
        }


def attention_maps(
    run: Run,
    dataset: BagDataset,
    fabric: Any,
    *,
    wanted: Iterable[str] | None = None,
    patch_size: float | None = None,
    progress: bool = False,
) -> Iterator[tuple[BagMap, dict[str, Any]]]:
    """A `BagMap` and the logits {task: [outputs]} for every bag of `dataset`, which has the model's views and tasks; of
    a bag of several slides one for each, whose attention sums to 1 over all of them.

    Args:
        wanted: names of the bags; None for all.
        patch_size: edge of all patches in the coordinates' unit; None: as the data says, or else a guess over all of
            `dataset` (`patch_sizes`).

    Raises:
        DataError: `patch_size` is not positive, or there is no bag of a name in `wanted`.
    """
    chosen = np.arange(len(dataset), dtype=np.int64)
    if wanted is not None:
        rows = {name: row for row, name in enumerate(dataset.names)}
        names = list(wanted)
        for name in names:
            if name not in rows:
                raise DataError(f"{dataset.name}: expected the name of a bag, got {name!r}")
        chosen = np.array([rows[name] for name in names], dtype=np.int64)
    joined = dataset.slides
    if joined is None:
        patches, positions = patch_sizes(dataset, chosen, patch_size), dataset.positions
        positions = None if positions is None else positions.take(chosen)
    else:
        joined = joined.take(chosen)
        single = BagDataset(joined.store, joined.views, (), dataset.name)
        rows_of = np.concatenate([*joined.members, np.empty(0, np.int64)])
        patches, positions = patch_sizes(single, rows_of, patch_size), single.positions
        positions = None if positions is None else positions.take(rows_of)
    dataset = dataset.subset(chosen)
    row = done = 0
    for batch, out in predict_batches(run, dataset, fabric, progress=progress, title="explain"):
        offsets = batch.ptr.tolist()
        attention = out.attention.float().cpu().numpy()
        weights = getattr(out, "view_weights", None)
        weights = None if weights is None or weights.shape[1] < 2 else weights.float().cpu().numpy()
        coords = None if batch.coords is None else batch.coords.double().cpu().numpy()
        for index, name in enumerate(batch.names):
            total = offsets[index + 1] - offsets[index]
            slides = [("", total)]
            if joined is not None:
                slides = list(zip(joined.names(done), joined.sizes(done).tolist(), strict=True))
            done += 1
            start = offsets[index]
            for slide, size in slides:
                part = slice(start, start + size)
                start += size
                known: dict[str, Any] = {"patch": float(patches.edge[row]), "guessed": bool(patches.guessed[row])}
                if positions is not None:
                    known |= {"unit": positions.unit, "pixel_size": float(positions.pixel_size[row])}
                yield (
                    BagMap(
                        name,
                        attention[part],
                        None if weights is None else weights[part],
                        None if coords is None else coords[part],
                        slide=slide,
                        total=total,
                        **known,
                    ),
                    {task: logits[index].float().cpu() for task, logits in out.logits.items()},
                )
                row += 1


@dataclass(frozen=True)
class Explanation:
    """What `explain` wrote.

    Attributes:
        bags: how many. heatmaps, geojson: files of each kind.
        without: names of the bags that have instances but no coordinates, so that nothing could be drawn.
        unsized: names of the bags with coordinates of which the size of a patch could not even be guessed.
        guessed: sizes of patches, in the coordinates' unit, that were guessed and drawn.
        unit: of the coordinates, "px" (level 0), "um", or "" where not known.
    """

    bags: int
    heatmaps: int
    geojson: int
    without: tuple[str, ...]
    unsized: tuple[str, ...] = ()
    guessed: tuple[float, ...] = ()
    unit: str = ""


def explain(
    run: Run,
    *,
    source: str | None = None,
    datasets: Mapping[str, BagDataset] | None = None,
    out: str | os.PathLike[str],
    split: str | None = None,
    bags: Sequence[str] | None = None,
    top: int = 20,
    heatmaps: bool = True,
    geojson: bool = True,
    pixel_size: float | None = None,
    patch_size: float | None = None,
    format: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    skip_bad: bool = False,
    progress: bool = True,
) -> Explanation:
    """Write what the model looked at in every bag of `source` (or `datasets`; the run's own data without either).

    Into `out`: `top_instances.csv` with the `top` instances of every bag and task by attention; and for each bag with
    coordinates `<bag>/attention-<task>.png`, with several views `<bag>/views.png`, and `<bag>/<bag>.geojson`; of a bag
    of several slides these for each slide, in `<bag>/<slide>`.

    Args:
        split: only this part of the data. bags: only these bags.
        pixel_size: micrometres per pixel at level 0, for GeoJSON where the data does not say.
        patch_size: edge of a patch in the unit of the coordinates; None: as the data says, or else a guess over all of
            it, which is right for patches that lie side by side.
        skip_bad: leave out what is bad in the source and list it on standard error.

    Returns:
        What was written.

    Raises:
        DataError: the data cannot be read or does not fit the model, there is no such bag, or a size is not positive.
        ValueError: top < 1.
    """
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    dataset, fabric = model_data(
        run,
        source=source,
        datasets=datasets,
        split=split,
        format=format,
        device=device,
        skip_bad=skip_bad,
        labels=False,
    )
    for member in run.each:
        tell(member, mixed_note(member))
    tasks = [task.name for task in run.model.config.tasks]
    views = [view.name for view in run.model.config.views]
    place = Path(out)
    counts = {"bags": 0, "heatmaps": 0, "geojson": 0}
    without, unsized, guessed, unit = [], [], set(), ""
    with ExitStack() as stack:
        stack.enter_context(ops.prefer_backend(backend))
        stream = stack.enter_context(atomic_file(place / "top_instances.csv"))
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        stack.callback(text.detach)
        writer = csv.writer(text, lineterminator="\n")
        slides = ["slide"] if dataset.slides is not None else []
        columns = ["bag", *slides, "task", "rank", "instance", "x", "y", "attention", "relative_attention"]
        writer.writerow(columns)
        found = attention_maps(run, dataset, fabric, wanted=bags, patch_size=patch_size, progress=progress)
        for bag in _counted(found, lambda maps: writer.writerows(_top(maps, tasks, top)), counts):
            bag = bag.placed
            if bag.coords is None or not len(bag.coords):
                without += [bag.title] if bag.total else []
                continue
            if np.isnan(bag.patch):
                unsized.append(bag.title)
                continue
            unit = bag.unit
            guessed |= {bag.patch} if bag.guessed else set()
            folder = place / _safe(bag.name) / _safe(bag.slide) if bag.slide else place / _safe(bag.name)
            if heatmaps:
                counts["heatmaps"] += _write_pictures(folder, bag, tasks, views)
            if geojson:
                if pixel_size is not None and not np.isfinite(bag.pixel_size):
                    bag = replace(bag, pixel_size=pixel_size)
                write_geojson(folder / f"{folder.name}.geojson", bag, tasks, views)
                counts["geojson"] += 1
    return Explanation(
        **counts, without=tuple(without), unsized=tuple(unsized), guessed=tuple(sorted(guessed)), unit=unit
    )


def _safe(name: str) -> str:
    """A name for a file: one that no system reads as a path."""
    safe = quote(name, safe=" +,=@")
    return safe if safe.strip(".") else safe.replace(".", "%2E")


def _counted(
    found: Iterable[tuple[BagMap, Any]], whole: Callable[[Sequence[BagMap]], None], counts: dict[str, int]
) -> Iterator[BagMap]:
    """All maps; before those of a bag, it is counted and `whole` is told all of it."""
    for _, pairs in itertools.groupby(found, key=lambda pair: pair[0].name):
        maps = [bag for bag, _ in pairs]
        counts["bags"] += 1
        whole(maps)
        yield from maps


def _top(maps: Sequence[BagMap], tasks: Sequence[str], top: int) -> Iterator[list[Any]]:
    """Lines of one bag, all of whose slides `maps` are."""
    attention, share = (
        np.concatenate([getattr(bag, name) for bag in maps]) for name in ("attention", "relative")
    )
    at = [(bag, i) for bag in maps for i in range(len(bag.attention))]
    for t, task in enumerate(tasks):
        for rank, row in enumerate((-attention[:, t]).argsort(kind="stable")[:top]):
            bag, i = at[row]
            nowhere = bag.coords is None or not np.isfinite(bag.coords[i]).all()
            x, y = ("", "") if nowhere else (f"{value:.10g}" for value in bag.coords[i])
            which = [bag.name, bag.slide] if bag.slide else [bag.name]
            yield [*which, task, rank + 1, i, x, y, f"{attention[row, t]:.6g}", f"{share[row, t]:.6g}"]


def _write_pictures(folder: Path, bag: BagMap, tasks: Sequence[str], views: Sequence[str]) -> int:
    figures = {
        f"attention-{task}": plot_maps(
            bag, {task: bag.relative[:, t]}, bag.title, "attention (1: all instances alike)", 0.0
        )
        for t, task in enumerate(tasks)
    }
    if bag.views is not None:
        panels = {view: bag.views[:, v] for v, view in enumerate(views)}
        figures["views"] = plot_maps(bag, panels, f"{bag.title}: weight of each view", "weight (sums to 1)", 0.0)
    for name, figure in figures.items():
        with atomic_file(folder / f"{_safe(name)}.png") as stream:
            figure.savefig(stream, format="png", dpi=110)
    return len(figures)
