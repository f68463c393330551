"""Heatmaps, GeoJSON and the list of instances, on bags whose patches lie where the test put them."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from umda_fast.data import Bag, BagDataset
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec, ViewSpec
from umda_fast.studies.maps import BagMap, explain, paint, plot_maps, write_geojson
from umda_fast.studies.patches import commonest_step, neighbour_steps, patch_sizes
from umda_fast.train import Run, load_run, make_config, train

VIEWS = (ViewSpec("stain", 4), ViewSpec("texture", 3))
TASKS = (TaskSpec("tumour", "binary"), TaskSpec("grade/of it", "multiclass", 3))
EDGE = 256.0


def bag(name: str, n: int, coords: bool = True) -> Bag:
    grid = torch.stack([torch.arange(n) % 4, torch.arange(n) // 4], 1) * EDGE + 1000
    labels = {"tumour": torch.tensor(float(n % 2)), "grade/of it": torch.tensor(n % 3)}
    views = {view.name: torch.randn(n, view.width) for view in VIEWS}
    return Bag(name, views, None, labels, grid if coords else None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    data = BagDataset([bag(f"bag {n}", n) for n in range(3, 13)], VIEWS, TASKS, "patches")
    config = make_config({"model": {"width": 16, "heads": 2, "layers": 1}, "train": {"epochs": 1}, "device": "cpu"})
    out = tmp_path_factory.mktemp("maps") / "run"
    train(config, out, datasets={"train": data, "val": data, "test": data}, progress=False, plots=False)
    return load_run(out)


def test_a_picture_holds_every_patch_where_it_is() -> None:
    coords = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0]])
    picture, cell = paint(coords, np.array([1.0, 2.0, 3.0]), 10.0)
    assert cell == 2.5
    assert picture.shape == (12, 8)
    assert (picture[:4, :4] == 1).all()
    assert (picture[:4, 4:] == 2).all()
    assert (picture[8:, :4] == 3).all()
    assert np.isnan(picture[4:8]).all()
    assert np.isnan(picture[8:, 4:]).all()


def test_where_patches_overlap_there_is_their_mean() -> None:
    picture, _ = paint(np.array([[0.0, 0.0], [5.0, 0.0]]), np.array([1.0, 3.0]), 10.0)
    assert picture[0].tolist() == [1, 1, 2, 2, 3, 3]


def test_a_large_slide_is_drawn_coarsely() -> None:
    side = 400
    coords = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * EDGE
    values = coords[:, 0] / EDGE
    picture, cell = paint(coords, values, EDGE, cells=100)
    assert picture.shape == (100, 100)
    assert cell == side * EDGE / 100
    assert np.nanmean(np.abs(picture[0] - np.arange(100) * 4 - 1.5)) < 1.0


def test_the_edge_of_a_patch_is_the_distance_of_neighbours() -> None:
    rows = np.concatenate([np.arange(5), np.arange(8, 20)]) * 224.0  # with a gap
    first = np.stack([rows, np.zeros(17)], 1)
    second = np.stack([rows[:9] + 50, np.full(9, 224.0)], 1)  # another contour, offset by 50
    assert commonest_step(neighbour_steps(np.concatenate([first, second])))[0] == 224.0
    assert np.isnan(commonest_step(neighbour_steps(np.array([[3.0, 4.0]])))[0])


def placed(name: str, coords: object) -> Bag:
    at = torch.as_tensor(coords, dtype=torch.float32)
    views = {view.name: torch.randn(len(at), view.width) for view in VIEWS}
    return Bag(name, views, None, {"tumour": torch.tensor(0.0), "grade/of it": torch.tensor(1)}, at)


def grid(rows: int, columns: int, step: float) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) * step


def cohort() -> BagDataset:
    """Dense slides with a step of 128, a slide of one patch, a sparse one, and one cut at another magnification."""
    slides = [placed(f"dense {n}", grid(4, 4, 128.0)) for n in range(3)]
    slides.append(placed("single", [[5120.0, 640.0]]))
    slides.append(placed("sparse", [[0.0, 0.0], [2560.0, 0.0], [2560.0, 5120.0]]))
    slides.append(placed("other", grid(5, 5, 512.0)))
    slides.append(placed("empty", np.zeros((0, 2))))
    return BagDataset(slides, VIEWS, TASKS, "slides")


def test_a_size_is_guessed_over_the_cohort_and_called_a_guess() -> None:
    data = cohort()
    found = patch_sizes(data, np.arange(7))
    assert found.edge.tolist() == [128.0, 128.0, 128.0, 128.0, 128.0, 512.0, 128.0]
    assert found.guessed.all()
    assert patch_sizes(data, np.array([3])).edge.tolist() == [128.0]  # also when that slide alone is asked for
    said = patch_sizes(data, np.arange(7), 256.0)
    assert said.edge.tolist() == [256.0] * 7
    assert not said.guessed.any()
    alone = patch_sizes(data.subset([3]), np.arange(1))
    assert np.isnan(alone.edge).all()
    for size in (0.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="patch_size: expected a positive number"):
            patch_sizes(data, np.arange(7), size)


def edges(place: Path) -> dict[str, float]:
    found = {}
    for path in place.rglob("*.geojson"):
        ring = json.loads(path.read_text())["features"][0]["geometry"]["coordinates"][0]
        found[path.stem] = ring[1][0] - ring[0][0]
    return found


def test_explain_draws_patches_as_large_as_they_are(run: Run, tmp_path: Path) -> None:
    chosen = ["dense 0", "single", "sparse"]
    options = {"datasets": {"all": cohort()}, "heatmaps": False, "progress": False}
    guess = explain(run, out=tmp_path / "guess", bags=chosen, **options)  # type: ignore[arg-type]
    assert edges(tmp_path / "guess") == dict.fromkeys(chosen, 128.0)
    assert (guess.guessed, guess.unsized) == ((128.0,), ())
    said = explain(run, out=tmp_path / "said", bags=chosen, patch_size=256.0, **options)  # type: ignore[arg-type]
    assert edges(tmp_path / "said") == dict.fromkeys(chosen, 256.0)
    assert said.guessed == ()
    options["datasets"] = {"all": cohort().subset([3])}
    alone = explain(run, out=tmp_path / "alone", **options)  # type: ignore[arg-type]
    assert (alone.geojson, alone.unsized) == (0, ("single",))


def test_a_picture_says_that_its_patches_are_guessed() -> None:
    for guessed in (True, False):
        figure = plot_maps(patches(patch=10.0, guessed=guessed), {"a": np.arange(3.0)}, "slide", "attention")
        assert ("guessed" in figure.get_suptitle()) == guessed


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_everything_is_written_for_every_bag(run: Run, tmp_path: Path) -> None:
    bags = [bag("one", 9), bag("a/b", 6), bag("nowhere", 5, coords=False), bag("empty", 0, coords=False)]
    datasets = {
        "all": BagDataset(bags[:2], VIEWS, TASKS, "with"),
    }
    result = explain(run, datasets=datasets, out=tmp_path, top=3, progress=False)
    assert (result.bags, result.heatmaps, result.geojson, result.without) == (2, 6, 2, ())
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    each = ["attention-tumour.png", "attention-grade%2Fof it.png", "views.png"]
    assert files == {"top_instances.csv", "one/one.geojson", "a%2Fb/a%2Fb.geojson"} | {
        f"{folder}/{name}" for folder in ("one", "a%2Fb") for name in each
    }
    assert imread(tmp_path / "one" / "attention-tumour.png").std() > 0.05  # not one colour

    lines = read(tmp_path / "top_instances.csv")
    assert len(lines) == 2 * 2 * 3
    geojson = json.loads((tmp_path / "one" / "one.geojson").read_text())
    tiles = [feature["properties"]["measurements"]["attention: tumour"] for feature in geojson["features"]]
    best = [line for line in lines if line["bag"] == "one" and line["task"] == "tumour"]
    assert [int(line["instance"]) for line in best] == sorted(range(9), key=lambda i: -tiles[i])[:3]
    first = int(best[0]["instance"])
    assert (float(best[0]["x"]), float(best[0]["y"])) == (1000 + first % 4 * EDGE, 1000 + first // 4 * EDGE)

    without = explain(run, datasets={"all": BagDataset(bags[2:], VIEWS, TASKS, "without")}, out=tmp_path / "w")
    assert (without.bags, without.heatmaps, without.without) == (2, 0, ("nowhere",))
    assert {line["x"] for line in read(tmp_path / "w" / "top_instances.csv")} == {""}


def test_only_the_bags_asked_for(run: Run, tmp_path: Path) -> None:
    data = {"all": BagDataset([bag("one", 9), bag("two", 6)], VIEWS, TASKS, "slides")}
    result = explain(run, datasets=data, out=tmp_path, bags=["two"], heatmaps=False, geojson=False, progress=False)
    assert (result.bags, result.heatmaps, result.geojson) == (1, 0, 0)
    assert {line["bag"] for line in read(tmp_path / "top_instances.csv")} == {"two"}
    with pytest.raises(DataError, match="slides: expected the name of a bag, got 'three'"):
        explain(run, datasets=data, out=tmp_path, bags=["three"], progress=False)
    with pytest.raises(ValueError, match="top"):
        explain(run, datasets=data, out=tmp_path, top=0)


def patches(**known: object) -> BagMap:
    attention = np.array([[0.5, 0.2], [0.3, 0.2], [0.2, 0.6]], dtype=np.float32)
    views = np.array([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]], dtype=np.float32)
    coords = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0]])
    return replace(BagMap("slide", attention, views, coords), **known)  # type: ignore[arg-type]


def test_geojson_is_what_qupath_reads(tmp_path: Path) -> None:
    """One tile per patch, closed rings, level-0 pixels, measurements by name."""
    path = tmp_path / "slide.geojson"
    write_geojson(path, patches(unit="px", patch=10.0), ["tumour", "grade"], ["stain", "texture"])
    content = json.loads(path.read_text())
    assert content["type"] == "FeatureCollection"
    assert [feature["type"] for feature in content["features"]] == ["Feature"] * 3
    second = content["features"][1]
    assert second["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[10.0, 0.0], [20.0, 0.0], [20.0, 10.0], [10.0, 10.0], [10.0, 0.0]]],
    }
    assert second["properties"]["objectType"] == "tile"
    assert second["properties"]["measurements"] == pytest.approx(
        {
            "attention: tumour": 0.9,
            "attention: grade": 0.6,
            "percentile: tumour": 66.667,
            "percentile: grade": 66.667,
            "view: stain": 0.5,
            "view: texture": 0.5,
        }
    )


def test_micrometres_become_pixels(tmp_path: Path) -> None:
    path = tmp_path / "slide.geojson"
    write_geojson(path, patches(unit="um", patch=10.0, pixel_size=0.25), ["a", "b"])
    ring = json.loads(path.read_text())["features"][1]["geometry"]["coordinates"][0]
    assert ring[0] == [40.0, 0.0]
    assert ring[2] == [80.0, 40.0]
    path.unlink()
    with pytest.raises(DataError, match=r"bag 'slide': coordinates are in micrometres; .* expected the pixel size"):
        write_geojson(path, patches(unit="um", patch=10.0), ["a", "b"])
    assert not path.exists()


def test_axes_say_their_unit() -> None:
    figure = plot_maps(patches(unit="um"), {"a": np.arange(3.0)}, "slide", "attention")
    assert re.search("µm", figure.axes[0].get_xlabel())
    assert figure.axes[0].yaxis_inverted()
