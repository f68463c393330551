"""Which files are one view: by what they say and where their patches lie, not by their folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.slide_files import NAMES, bag, grid, write_clam, write_labels, write_trident
from umda_fast.data import load_source, pack_slides
from umda_fast.errors import DataError


def views_of(root, **options):
    whole = load_source(root, **options).whole
    return {view.name: view.width for view in whole.views}, whole.names


def write(folder, name, seed, *, n=60, width=4, encoder="uni_v1", step=512, side=20, **attributes):
    """A slide with its own features and places."""
    rng = np.random.default_rng(seed)
    coords = grid(rng, n, step, side)
    return write_trident(folder, name, rng.normal(size=(n, width)).astype(np.float32), coords, encoder, **attributes)


def two_sizes(job, *, attributes=True):
    """UNI on 256 pixels, CONCH on 512, of the same tissue; one small patch and one slide without their counterpart."""
    for index, name in enumerate(NAMES):
        rng = np.random.default_rng(index)
        large = grid(rng, 20, 1024, 10)
        small = (large[:, None] + np.array([[0, 0], [0, 512], [512, 0], [512, 512]])).reshape(-1, 2)
        small = rng.permutation(small)[1:]
        for encoder, coords, pixels, width in (("uni_v1", small, 256, 4), ("conch_v15", large, 512, 3)):
            folder = job / f"20x_{pixels}px_0px_overlap" / f"features_{encoder}"
            features = coords.astype(np.float32) @ np.ones((2, width), np.float32) + np.arange(width)
            said = {"patch_size": pixels, "patch_size_level0": 2 * pixels} if attributes else {}
            if attributes:
                write_trident(folder, name, features, coords, encoder, **said)
            else:
                write_clam(folder, name, features, coords, pt=False)
    return job


class TestSizes:
    @pytest.mark.parametrize("attributes", [True, False])
    def test_a_large_patch_stands_beside_the_small_ones_in_it(self, tmp_path, attributes):
        job = two_sizes(tmp_path / "job", attributes=attributes)
        splits = load_source(job)
        assert {view.name: view.width for view in splits.views} == {"uni_v1": 4, "conch_v15": 3}
        said = "large patches stand beside each small one in them (uni_v1 512 px, conch_v15 1024 px"
        assert said + (")" if attributes else ", by their steps)") in splits.description
        if attributes:
            assert splits.whole.positions.patch_size.tolist() == [512.0] * 12
        for got in splits.whole:
            assert len(got) == 79
            assert got.mask is None
            places = got.coords.double()
            corner = torch.floor(places / 1024) * 1024
            assert (places % 1024 > 0).any()
            np.testing.assert_array_equal(got.views["uni_v1"][:, 0], places.sum(1))
            np.testing.assert_array_equal(got.views["conch_v15"][:, 0], corner.sum(1))
        pack_slides(job, tmp_path / "packed")
        assert said in load_source(tmp_path / "packed").description
        assert views_of(tmp_path / "packed", views=["uni_v1"])[0] == {"uni_v1": 4}
        with pytest.raises(DataError, match=r"packed: views: expected uni_v1 among them, got conch_v15: .* pack these"):
            load_source(tmp_path / "packed", views=["conch_v15"])
        for one, other in zip(load_source(tmp_path / "packed").whole, splits.whole, strict=True):
            torch.testing.assert_close(one.views, other.views)
            torch.testing.assert_close(one.coords, other.coords)

    def test_one_size_of_them(self, tmp_path):
        job = two_sizes(tmp_path / "job")
        assert views_of(job, views=["conch_v15"])[0] == {"conch_v15": 3}
        assert views_of(job / "20x_512px_0px_overlap")[0] == {"conch_v15": 3}
        assert load_source(job, views="conch_v15").whole.sizes.tolist() == [20] * 12

    def test_a_large_patch_and_a_small_one_without_the_other(self, tmp_path):
        write_trident(tmp_path / "a", "s", np.ones((4, 2), np.float32), grid(np.random.default_rng(0), 4, 512, 2), "a")
        large = np.array([[0, 0], [1024, 0]])
        file = write_trident(tmp_path / "b", "s", np.ones((2, 3), np.float32), large, "b", patch_size_level0=1024)
        got = load_source(tmp_path).whole[0]
        assert got.mask.tolist() == [[True, True]] * 4 + [[False, True]]
        assert got.coords[4].tolist() == [1024, 0]
        write_trident(tmp_path / "b", "s", np.ones((2, 3), np.float32), large, "b", patch_size_level0=600)
        advice = r"or at least 1\.5 times as large, got 600; choose a view"
        with pytest.raises(DataError, match=rf"{file}: expected patches of 512 px as in .*a/s\.h5, {advice}"):
            load_source(tmp_path)

    def test_two_magnifications_of_one_encoder(self, tmp_path):
        for magnification, size in ((20, 512), (10, 1024)):
            folder = tmp_path / f"{magnification}x_256px_0px_overlap" / "features_uni_v1"
            for index, name in enumerate(NAMES[:3]):
                side = 8192 // size
                said = {"target_magnification": magnification, "patch_size_level0": size}
                write(folder, name, index, n=side**2, step=size, side=side, **said)
        names = {"uni_v1_10x_256px": 4, "uni_v1_20x_256px": 4}
        assert views_of(tmp_path) == (names, NAMES[:3])
        assert load_source(tmp_path).whole.sizes.tolist() == [256] * 3
        assert views_of(tmp_path, views=["uni_v1_20x_256px"])[0] == {"uni_v1_20x_256px": 4}

    def test_magnifications_in_one_folder(self, tmp_path):
        for index, name in enumerate(NAMES[:4]):
            write(tmp_path, name, index, target_magnification=20 if index < 3 else 10)
        splits = load_source(tmp_path)
        assert [view.name for view in splits.views] == ["uni_v1_20x_256px", "uni_v1_10x_256px"]
        assert "3 without view uni_v1_10x_256px" in splits.description

    def test_encoders_in_one_folder(self, tmp_path):
        for index, name in enumerate(NAMES[:4]):
            write(tmp_path, name, index, encoder="uni_v1" if index < 3 else "virchow")
        assert views_of(tmp_path)[0] == {"uni_v1": 4, "virchow": 4}


class TestPlaces:
    def sites(self, tmp_path, encoder):
        for site in "AB":
            for index in range(6):
                write(tmp_path / f"h{site}", f"{index:03d}", index + 100 * (site == "B"), encoder=encoder)
        return tmp_path

    @pytest.mark.parametrize("encoder", ["uni_v1", None])
    def test_names_that_two_sites_have(self, tmp_path, encoder):
        root = self.sites(tmp_path / "d", encoder)
        names = [f"h{site}/{index:03d}" for site in "AB" for index in range(6)]
        view = {encoder or "features": 4}
        assert views_of(root) == (view, names)
        assert "12 names that several folders have, told apart as 'hA/000', " in load_source(root).description
        write_labels(root / "labels.csv", {"slide_id": [f"{index:03d}" for index in range(6)], "y": [0, 1] * 3})
        with pytest.raises(DataError, match=r"labels\.csv: '000' may be 'hA/000' or 'hB/000'; .* \(6 such names\)"):
            load_source(root)
        write_labels(root / "labels.csv", {"slide_id": [f"raw/{name}.svs" for name in names], "y": [0, 1] * 6})
        assert load_source(root).whole.labels["y"].tolist() == [0, 1] * 6
        pack_slides(root, tmp_path / "packed")
        assert load_source(tmp_path / "packed").whole.labels["y"].tolist() == [0, 1] * 6

    def test_one_name_of_several(self, tmp_path):
        for folder, name, seed in (("hA", "a", 0), ("hA", "b", 1), ("hB", "a", 2), ("hB", "c", 3)):
            write(tmp_path / folder, name, seed)
        assert views_of(tmp_path)[1] == ["b", "c", "hA/a", "hB/a"]

    def test_sites_with_two_encoders_each(self, tmp_path):
        """Names are told apart alike in both views, also where a site lacks a view."""
        for site, seed in (("hA", 0), ("hB", 1)):
            for encoder, width in (("uni", 4), ("conch", 3)):
                if (site, encoder) != ("hB", "conch"):
                    write(tmp_path / site / encoder, "a", seed, width=width, encoder=None)
        whole = load_source(tmp_path).whole
        assert {view.name: view.width for view in whole.views} == {"conch": 3, "uni": 4}
        assert whole.names == ["hA/a", "hB/a"]
        assert [list(got.views) for got in whole] == [["conch", "uni"], ["uni"]]

    def test_views_of_one_width_in_folders_of_sites(self, tmp_path):
        for site, seeds in (("hA", (0, 1)), ("hB", (2, 3))):
            for view in ("uni", "conch"):
                for seed in seeds:
                    features, coords = bag(seed, 30)
                    write_clam(tmp_path / site / view, f"s{seed}", features + (view == "uni"), coords, pt=False)
        assert views_of(tmp_path) == ({"conch": 4, "uni": 4}, ["s0", "s1", "s2", "s3"])

    def test_one_encoder_on_the_same_patches_twice(self, tmp_path):
        for folder, shift in (("raw", 0), ("normalised", 1)):
            for index, name in enumerate(NAMES[:3]):
                features, coords = bag(index)
                write_trident(tmp_path / folder, name, features + shift, coords, "uni_v1")
        assert views_of(tmp_path) == ({"normalised": 4, "raw": 4}, NAMES[:3])

    @pytest.mark.parametrize(("shared", "good"), [(20, True), (19, False)])
    def test_half_of_the_fewer_patches_must_lie_on_the_others(self, tmp_path, shared, good):
        places = grid(np.random.default_rng(0), 140)
        rng = np.random.default_rng(1)
        for view, coords in (("a", places[:100]), ("b", places[100 - shared : 140 - shared])):
            write_trident(tmp_path / view, "s", rng.normal(size=(len(coords), 4)).astype(np.float32), coords, view)
        if good:
            assert load_source(tmp_path).whole.sizes.tolist() == [120]
            return
        with pytest.raises(DataError, match=r"b/s\.h5: wrong unit or slide: expected at least 50% .* got 48% \("):
            load_source(tmp_path)

    def test_a_folder_for_each_slide(self, tmp_path):
        names = [f"P{index}" for index in range(5)]
        for index, name in enumerate(names):
            write(tmp_path / name, "features", index, encoder=None)
        assert views_of(tmp_path) == ({"features": 4}, names)
        assert "bags are called after their folders" in load_source(tmp_path).description
        for index, name in enumerate(names):
            write(tmp_path / name, "other", index, width=3, encoder=None)
        write_labels(tmp_path / "labels.csv", {"slide": names, "y": [0, 1, 0, 1, 0]})
        assert views_of(tmp_path) == ({"features": 4, "other": 3}, names)
        assert load_source(tmp_path).whole.labels["y"].tolist() == [0, 1, 0, 1, 0]
        (tmp_path / "P2" / "features.h5").write_bytes(b"")
        (tmp_path / "P2" / "other.h5").write_bytes(b"")
        splits = load_source(tmp_path, skip_bad=True)
        assert splits.whole.names == ["P0", "P1", "P3", "P4"]
        assert len(splits.skipped) == 2  # and nothing about the row of P2

    def test_a_folder_for_each_patient_with_slides_of_the_same_names(self, tmp_path):
        for index in range(5):
            for number, name in enumerate(("left", "right")):
                write(tmp_path / f"P{index}", name, 10 * index + number, encoder=None)
        assert views_of(tmp_path) == ({"features": 4}, [f"P{k}/{side}" for k in range(5) for side in ("left", "right")])

    def test_three_views_of_one_slide(self, tmp_path):
        features, coords = bag(0)
        for shift, view in enumerate("abc"):
            write_clam(tmp_path / view, "s", features + shift, coords, pt=False)
        assert views_of(tmp_path) == ({"a": 4, "b": 4, "c": 4}, ["s"])
        write_clam(tmp_path / "c", "s", features, coords, pt=False)
        assert "views a and c seem to be the same features" in load_source(tmp_path).description

    def test_jobs_of_several_cohorts(self, tmp_path):
        for cohort, seed in (("A", 0), ("B", 10)):
            for pixels in (256, 512):
                folder = tmp_path / cohort / f"20x_{pixels}px_0px_overlap" / "features_uni_v1"
                for index in range(2):
                    features, coords = bag(seed + index)
                    shifted = features + pixels
                    write_clam(folder, f"{cohort}{index}", shifted, coords // 512 * 2 * pixels, pt=False)
        assert views_of(tmp_path, views=["uni_v1_20x_256px"])[1] == ["A0", "A1", "B0", "B1"]

    def test_folders_that_look_like_a_split(self, tmp_path):
        for folder, name, seed in (("train", "a", 0), ("train", "b", 1), ("test", "c", 2)):
            write(tmp_path / folder, name, seed)
        assert "folders called train, val, test are no split" in load_source(tmp_path).description
