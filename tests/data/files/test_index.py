"""Files that cannot be used, alone and left out, and reading bags when they are needed."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from tests.slide_files import NAMES, bag, write_stamp, write_trident
from umda_fast.data import InstanceBudgetSampler, inspect_source, load_source, make_loader
from umda_fast.errors import DataError


def load(root, **options):
    return load_source(root, **options).whole


class TestBad:
    """Every fault alone is an error naming the file; skipped, the rest goes on."""

    @pytest.fixture(
        params=["truncated", "garbage", "width", "nan", "coords", "stem", "content", "unit", "step", "pickle"]
    )
    def fault(self, request, trident):
        folder = trident / "20x_256px_0px_overlap" / "features_uni_v1"
        path = folder / "s03.h5"
        features, coords = bag(3)
        if request.param == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        elif request.param == "garbage":
            path.write_bytes(b"not HDF5" * 100)
        elif request.param == "width":
            write_trident(folder, "s03", features[:, :2], coords)
        elif request.param == "nan":
            features[2, 1] = np.nan
            write_trident(folder, "s03", features, coords)
        elif request.param == "coords":
            write_trident(folder, "s03", features, coords[:-1])
        elif request.param == "stem":
            path = folder / "s03.pt"
            torch.save(torch.from_numpy(features), path)
        elif request.param == "content":
            path = write_trident(folder, "s03b", features, coords)
        elif request.param == "unit":
            path.unlink()
            path = write_stamp(folder, "s03", features, coords, unit="mm")
        elif request.param == "step":
            write_trident(folder, "s03", features, coords // 2)
        elif request.param == "pickle":
            path.unlink()
            path = folder / "s03.pt"
            path.write_bytes(pickle.dumps({"features": [1]}, protocol=2))
        return request.param, path

    def test_is_an_error_with_its_name(self, fault, trident):
        with pytest.raises(DataError, match=str(fault[1])):
            inspect_source(trident)

    def test_is_skipped(self, fault, trident):
        kind, path = fault
        report = inspect_source(trident, skip_bad=True)
        assert len(report.skipped) == 1
        assert str(path) in report.skipped[0]
        assert report.first_problem == f"skipped: {report.skipped[0]}"
        # The slide stays with its other view where there is one.
        assert sum(report.bags.values()) == 12
        whole = load(trident, skip_bad=True)
        assert (list(whole[3].views) == ["conch_v15"]) == (kind not in ("stem", "content"))

    def test_labels_of_a_slide_that_was_skipped(self, clam):
        (clam / "h5_files" / "s03.h5").write_bytes(b"")
        with pytest.raises(DataError, match=r"s03\.h5: corrupt or truncated"):
            load(clam)
        whole = load(clam, skip_bad=True)
        assert whole.names == [name for name in NAMES if name != "s03"]
        assert len(whole.skipped) == 1

    def test_nothing_left(self, tmp_path):
        (tmp_path / "a.h5").write_bytes(b"")
        with pytest.raises(DataError, match="expected features, got none that can be read in 1 files"):
            load(tmp_path, skip_bad=True)

    def test_a_run_directory(self, tmp_path):
        torch.save({"model": {}, "epoch": 3}, tmp_path / "checkpoint.pt")
        with pytest.raises(DataError, match=r"checkpoint\.pt: expected a tensor .*got a mapping with model, epoch"):
            load(tmp_path)


class TestReading:
    def test_lazily(self, clam):
        whole = load(clam)
        (clam / "h5_files" / "s03.h5").unlink()
        assert len(whole) == 12
        whole[2]
        with pytest.raises(DataError, match=r"s03\.h5"):
            whole[3]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers_and_budget(self, trident, workers):
        """Bags larger than the budget are batches of their own; no file stays open."""
        whole = load(trident)
        sampler = InstanceBudgetSampler(whole.sizes, 10, shuffle=False)
        before = len(os.listdir("/proc/self/fd")) if workers == 0 else 0
        batches = list(make_loader(whole, sampler, workers=workers, pin=False))
        assert [name for batch in batches for name in batch.names] == NAMES
        assert all(len(batch) == 1 for batch in batches)
        assert {batch.num_instances for batch in batches} == {9, 10, 11}
        assert (len(os.listdir("/proc/self/fd")) if workers == 0 else 0) == before

    def test_half_precision_is_kept(self, tmp_path):
        features, coords = bag(0)
        write_stamp(tmp_path, "a", features, coords)
        write_stamp(tmp_path, "b", features + 1, coords)
        whole = load(tmp_path)
        assert whole.collate(list(whole)).views["uni"].dtype == torch.float16

    def test_pickled(self, trident):
        whole = pickle.loads(pickle.dumps(load(trident)))
        assert whole[4].views["uni_v1"].shape == (10, 4)
