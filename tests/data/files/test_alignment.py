"""One unit for all coordinates, and views that lie on top of each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.slide_files import NAMES, bag, write_clam, write_labels, write_stamp, write_trident
from umda_fast.data import load_source
from umda_fast.data.dataset import concat
from umda_fast.errors import DataError


def load(root, **options):
    return load_source(root, **options).whole


class TestUnits:
    def test_pixels_become_micrometres_where_the_pixel_size_is_known(self, clam):
        coords = bag(2)[1]
        whole = load(clam, mpp=0.25)
        assert whole.positions.unit == "um"
        assert whole.positions.pixel_size.tolist() == [0.25] * 12
        np.testing.assert_allclose(whole[2].coords, coords * 0.25)
        for wrong in (250, "x", math.nan, 0):
            with pytest.raises(DataError, match="mpp: expected micrometres per pixel"):
                load(clam, mpp=wrong)

    def test_a_column_of_pixel_sizes(self, clam):
        table = write_labels(clam / "labels.csv", {"slide": NAMES, "mpp": [0.25] * 6 + [0.5] * 6, "y": [0, 1] * 6})
        whole = load(clam)
        np.testing.assert_allclose(whole[7].coords, bag(7)[1] * 0.5)
        assert [task.name for task in whole.tasks] == ["y"]
        table.write_text(table.read_text().replace("0.5,1", "500,1", 1))
        with pytest.raises(DataError, match=r"labels\.csv: slide 's07': mpp: expected"):
            load(clam)
        table.write_text(table.read_text().replace("500,1", ",1", 1))
        whole = load(clam)  # not known everywhere, so pixels everywhere
        assert whole.positions.unit == "px"
        assert np.isnan(whole.positions.pixel_size[7])

    def test_both_units(self, tmp_path):
        features, coords = bag(0)
        write_stamp(tmp_path, "a", features, coords / 4)
        write_trident(tmp_path, "b", features + 1, coords)
        with pytest.raises(DataError, match=r"b\.h5: wrong unit: level-0 pixels, where .*a\.h5 has micrometres.*mpp"):
            load(tmp_path)
        whole = load(tmp_path, mpp=0.25)
        assert whole.positions.unit == "um"
        assert whole.positions.patch_size.tolist() == [256.0, 128.0]
        np.testing.assert_allclose(whole[0].coords, whole[1].coords)
        skipping = load(tmp_path, skip_bad=True)
        assert skipping.names == ["a"]
        assert "b.h5: wrong unit" in skipping.skipped[0]

    def test_views_that_share_no_place(self, tmp_path):
        features, coords = bag(0)
        write_clam(tmp_path / "one", "a", features, coords + 1)
        write_clam(tmp_path / "two", "a", features[:, :3], (coords + 1) // 7)
        said = r"two/.*a\.h5: wrong unit or slide: expected at least 50% of its patches on those of .* got 0% \(.*spans"
        with pytest.raises(DataError, match=said):
            load(tmp_path)

    def test_views_of_different_patches(self, tmp_path):
        features, coords = bag(0)
        write_trident(tmp_path / "one", "a", features, coords, "one")
        write_trident(tmp_path / "two", "a", features, coords * 2, "two", patch_size_level0=1024)
        with pytest.raises(DataError, match=r"two/a\.h5: wrong unit or slide: expected at least 50% of its patches"):
            load(tmp_path)

    def test_positions_follow_subsets(self, trident):
        splits = load_source(trident, mpp=0.5)
        part = splits.train.subset([2, 0])
        assert part.positions.patch_size.tolist() == [256.0, 256.0]
        both = concat([splits.train, splits.val], "both")
        assert len(both.positions.pixel_size) == len(both)
