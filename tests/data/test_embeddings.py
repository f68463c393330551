"""Features of whole slides: beside patches, where they are asked for, and alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.slide_files import NAMES, bag, write_labels, write_stamp, write_trident
from umda_fast.data import BagDataset, collate, inspect_source, load_source, pack_slides
from umda_fast.errors import DataError

WIDTH = 5


def vector(index: int, width: int = WIDTH) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1000 + index).normal(size=width).astype(np.float32)


def write_whole(folder: Path, name: str, features: np.ndarray[Any, Any], coords: np.ndarray[Any, Any]) -> Path:
    """As TRIDENT writes it: a vector, beside the coordinates of the patches that it was made of."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.h5"
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["features"].attrs["name"] = name
        file["features"].attrs["savetodir"] = str(folder)
        file["coords"] = coords.astype(np.int64)
        file["coords"].attrs["patch_size_level0"] = 512
    return path


def write_encoded(folder: Path, name: str, features: np.ndarray[Any, Any], kind: str = "slide", **more: Any) -> Path:
    """As STAMP writes it: one row, and what it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.h5"
    about = {"version": "2.4.0", "encoder": "titan", "precision": "torch.float32", "code_hash": "0123abcd", **more}
    with h5py.File(path, "w") as file:
        file["feats"] = features
        for key, value in {**about, "feat_type": kind}.items():
            file.attrs[key] = value
    return path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Patches of twelve slides by one encoder; vectors of all but s03, and of a slide without patches, by another."""
    job = tmp_path / "job"
    folder = job / "20x_256px_0px_overlap"
    for index, name in enumerate(NAMES):
        features, coords = bag(index)
        write_trident(folder / "features_uni_v1", name, features, coords, "uni_v1")
        if index != 3:
            write_whole(folder / "slide_features_titan", name, vector(index), coords)
    write_whole(folder / "slide_features_titan", "only", vector(99), bag(0)[1])
    write_labels(job / "labels.csv", {"slide": [*NAMES, "only"], "y": [0, 1] * 6 + [1]})
    return job


class TestBesidePatches:
    def views(self, dataset: BagDataset) -> list[str]:
        return [view.name for view in dataset.views]

    def test_not_where_nobody_asked(self, job: Path) -> None:
        splits = load_source(job, partial=True)
        assert self.views(splits.whole) == ["uni_v1"]
        assert "features of whole slides, not read: titan; data.options.views=[uni_v1, titan]" in splits.description

    def test_an_instance_of_its_own(self, job: Path) -> None:
        alone = load_source(job, partial=True).whole
        whole = load_source(job, views=["uni_v1", "titan"]).whole
        assert self.views(whole) == ["uni_v1", "titan"]
        assert whole.names == ["only", *NAMES]
        sizes = dict(zip(whole.names, whole.sizes.tolist(), strict=True))
        for index, name in enumerate(NAMES):
            assert sizes[name] == alone.sizes[index] + (index != 3)
        one, other = alone[4], whole[5]
        n = len(one)
        assert torch.equal(other.views["uni_v1"][:n], one.views["uni_v1"])
        assert torch.equal(other.views["titan"][n], torch.from_numpy(vector(4)))
        assert other.mask is not None
        assert other.mask.tolist() == [[True, False]] * n + [[False, True]]
        assert other.coords is not None
        assert torch.equal(other.coords[:n], one.coords)
        assert bool(other.coords[n].isnan().all())

    def test_one_or_the_other_may_be_missing(self, job: Path) -> None:
        whole = load_source(job, views=["uni_v1", "titan"]).whole
        bare, only = whole[4], whole[0]
        assert (bare.name, only.name, len(only)) == ("s03", "only", 1)
        assert "titan" not in bare.views
        assert "uni_v1" not in only.views
        batch = collate([bare, only, whole[1]], whole.views, whole.tasks)
        assert not batch.mask[: len(bare), 1].any()
        assert batch.mask[len(bare)].tolist() == [False, True]

    def test_no_neighbour_by_coordinates(self, job: Path) -> None:
        whole = load_source(job, views=["uni_v1", "titan"]).whole
        batch = collate([whole[1], whole[2]], whole.views, whole.tasks)
        assert batch.frames is not None
        first, second = len(whole[1]), len(whole[2])
        assert batch.frames.tolist() == [0, first - 1, first, first + second - 1, first + second]

    def test_several_are_one_instance(self, job: Path) -> None:
        folder = job / "20x_256px_0px_overlap"
        for index, name in enumerate(NAMES):
            write_whole(folder / "slide_features_prism", name, vector(500 + index), bag(index)[1])
        whole = load_source(job, views=["uni_v1", "titan", "prism"]).whole
        last = whole[1]
        assert last.mask is not None
        assert last.mask[-1].tolist() == [False, True, True]
        assert int(last.mask[:, 1].sum()) == 1

    def test_with_two_encoders_of_patches(self, trident: Path) -> None:
        (trident / "20x_256px_0px_overlap" / "slide_features_titan" / "s00.h5").unlink()
        for index, name in enumerate(NAMES):
            write_whole(trident / "20x_256px_0px_overlap" / "slide_features_titan", name, vector(index), bag(index)[1])
        before = load_source(trident).whole
        whole = load_source(trident, views=["conch_v15", "titan", "uni_v1"]).whole
        assert (whole.sizes - before.sizes).tolist() == [1] * 12
        for one, other in zip(before, whole, strict=True):
            assert other.mask is not None
            here = torch.ones(len(one), 2, dtype=torch.bool) if one.mask is None else one.mask
            if "conch_v15" not in one.views:
                here = torch.tensor([[False, True]]).expand(len(one), -1)
            assert torch.equal(other.mask[:-1][:, [0, 2]], here)
            assert torch.equal(other.views["uni_v1"][: len(one)], one.views["uni_v1"])

    def test_an_encoder_of_both(self, job: Path) -> None:
        """TRIDENT's gigapath is one of patches and one of slides."""
        folder = job / "20x_256px_0px_overlap"
        (folder / "slide_features_titan").rename(folder / "slide_features_uni_v1")
        noted = load_source(job, partial=True)
        assert "not read: uni_v1_slide; data.options.views=[uni_v1, uni_v1_slide]" in noted.description
        for views in (["uni_v1", "uni_v1_slide"], ["uni_v1_slide"]):
            assert self.views(load_source(job, views=views, partial=True).whole) == views
        assert load_source(job, views=["uni_v1"], partial=True).whole.sizes.tolist() == noted.whole.sizes.tolist()

    def test_folders_beside_files_are_not_read(self, job: Path, tmp_path: Path) -> None:
        folder = job / "20x_256px_0px_overlap"
        (folder / "features_uni_v1").rename(tmp_path / "flat")
        (folder / "slide_features_titan").rename(tmp_path / "flat" / "slide_features_titan")
        assert "views=" not in load_source(tmp_path / "flat").description

    def test_packed(self, job: Path, tmp_path: Path) -> None:
        pack_slides(job, tmp_path / "packed", views=["uni_v1", "titan"])
        packed, whole = load_source(tmp_path / "packed").whole, load_source(job, views=["uni_v1", "titan"]).whole
        for one, other in zip(packed, whole, strict=True):
            assert one.name == other.name
            for view in one.views.keys() & other.views.keys():
                assert torch.equal(one.views[view], other.views[view])
            ours, theirs = (collate([made], whole.views, whole.tasks) for made in (one, other))
            assert torch.equal(ours.mask, theirs.mask)
            assert (ours.frames is None) == (theirs.frames is None) == (one.name == "s03")
            assert theirs.frames is None or torch.equal(ours.frames, theirs.frames)

    def test_of_patients(self, job: Path) -> None:
        write_labels(
            job / "labels.csv",
            {
                "patient": [*(f"p{index // 2}" for index in range(12)), "p9"],
                "slide": [*NAMES, "only"],
                "y": [0] * 6 + [1] * 7,
            },
        )
        whole = load_source(job, views=["uni_v1", "titan"], bag="patient").whole
        row = whole.names.index("p2")
        joined = whole[row]
        assert joined.mask is not None
        assert int(joined.mask[:, 1].sum()) == 2
        batch = collate([joined], whole.views, whole.tasks)
        assert batch.frames is not None
        assert len(batch.frames) == 5  # patches and vector, patches and vector


class TestAlone:
    def test_of_trident(self, job: Path) -> None:
        shutil.rmtree(job / "20x_256px_0px_overlap" / "features_uni_v1")
        whole = load_source(job, partial=True).whole
        assert [(view.name, view.width) for view in whole.views] == [("titan", WIDTH)]
        assert whole.sizes.tolist() == [1] * 12
        assert whole.names == sorted(["only", *(name for name in NAMES if name != "s03")])
        assert whole[0].coords is None
        report = inspect_source(job, partial=True)
        assert report.faults == []
        assert "TRIDENT" in report.description

    @pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH)])
    def test_of_stamp(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        for index, name in enumerate(NAMES):
            write_encoded(tmp_path / "titan-slide-0123abcd", name, vector(index).reshape(shape))
        write_labels(tmp_path / "labels.csv", {"slide": NAMES, "y": [0, 1] * 6})
        whole = load_source(tmp_path).whole
        assert [view.name for view in whole.views] == ["titan"]
        assert torch.equal(whole[7].views["titan"], torch.from_numpy(vector(7))[None])

    def test_of_patients(self, tmp_path: Path) -> None:
        for index in range(6):
            write_encoded(tmp_path, f"P{index}", vector(index), "patient")
        write_labels(tmp_path / "labels.csv", {"patient": [f"P{index}" for index in range(6)], "y": [0, 1] * 3})
        whole = load_source(tmp_path).whole
        assert whole.labels["y"].tolist() == [0, 1] * 3

    @pytest.mark.parametrize("suffix", [".npz", ".pt"])
    def test_by_hand(self, tmp_path: Path, suffix: str) -> None:
        for index, name in enumerate(NAMES):
            if suffix == ".pt":
                torch.save(torch.from_numpy(vector(index)), tmp_path / f"{name}.pt")
            else:
                np.savez(tmp_path / f"{name}.npz", features=vector(index))
        write_labels(tmp_path / "labels.csv", {"slide": NAMES, "y": [0, 1] * 6})
        whole = load_source(tmp_path).whole
        assert whole.sizes.tolist() == [1] * 12
        (view,) = whole.views
        assert torch.equal(whole[3].views[view.name], torch.from_numpy(vector(3))[None])

    def test_two_encoders_are_views_of_one_instance(self, tmp_path: Path) -> None:
        for index, name in enumerate(NAMES):
            write_encoded(tmp_path / "titan", name, vector(index), encoder="titan")
            write_encoded(tmp_path / "cobra", name, vector(50 + index, 3), encoder="cobra")
        write_labels(tmp_path / "labels.csv", {"slide": NAMES, "y": [0, 1] * 6})
        whole = load_source(tmp_path).whole
        assert {(view.name, view.width) for view in whole.views} == {("titan", WIDTH), ("cobra", 3)}
        assert whole.sizes.tolist() == [1] * 12
        assert whole[0].mask is None


class TestAmbiguous:
    def test_beside_patches_it_is_asked(self, tmp_path: Path) -> None:
        for index, name in enumerate(NAMES):
            features, coords = bag(index)
            write_stamp(tmp_path / "uni-0123abcd", name, features, coords / 2)
            write_encoded(tmp_path / "titan-slide-0123abcd", name, vector(index))
        with pytest.raises(DataError, match=r"s00.h5: features of a whole slide, beside patches: to take both, --set"):
            load_source(tmp_path)
        assert load_source(tmp_path, views=["uni"]).whole.sizes.tolist() == [9, 10, 11] * 4
        assert load_source(tmp_path, views=["uni", "titan"]).whole.sizes.tolist() == [10, 11, 12] * 4
        assert load_source(tmp_path, views=["titan"]).whole.sizes.tolist() == [1] * 12

    def test_of_patients_beside_slides(self, tmp_path: Path) -> None:
        for index, name in enumerate(NAMES):
            features, coords = bag(index)
            write_stamp(tmp_path / "uni-0123abcd", name, features, coords / 2)
            write_encoded(tmp_path / "cobra", f"P{index}", vector(index), "patient", encoder="cobra")
        with pytest.raises(DataError, match="expected features of slides as the other views, got features of a who"):
            load_source(tmp_path, views=["uni", "cobra"])

    def test_one_row_without_a_word_is_not_guessed(self, tmp_path: Path) -> None:
        """[1, D] may be the only patch of a slide."""
        for index, name in enumerate(NAMES):
            features, coords = bag(index)
            write_trident(tmp_path / "features_uni_v1", name, features, coords, "uni_v1")
            (tmp_path / "mine").mkdir(exist_ok=True)
            np.savez(tmp_path / "mine" / f"{name}.npz", features=vector(index)[None])
        with pytest.raises(DataError, match=r"expected coordinates as .* has them, got none; .*one vector, \[D\]"):
            load_source(tmp_path)

    def test_more_rows_than_a_slide_has(self, tmp_path: Path) -> None:
        write_encoded(tmp_path, "s00", np.stack([vector(0), vector(1)]))
        with pytest.raises(DataError, match=r"s00.h5: expected one row of a whole slide, as feat_type says, got 2"):
            load_source(tmp_path)

    def test_values_that_are_not_finite(self, tmp_path: Path) -> None:
        write_encoded(tmp_path, "s00", np.array([1.0, np.nan, 2.0], np.float32))
        with pytest.raises(DataError, match=r"s00.h5: features: expected finite numbers, got nan at row 0, column 1"):
            load_source(tmp_path).whole[0]
