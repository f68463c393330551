"""Which files of a directory are bags, as each tool leaves them, and of which view."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.slide_files import NAMES, bag, write_clam, write_stamp, write_trident
from umda_fast.data import find_format, load_source
from umda_fast.errors import DataError


def load(root, **options):
    return load_source(root, **options).whole


class TestLayouts:
    def test_clam(self, clam):
        splits = load_source(clam)
        whole = splits.whole
        assert find_format(str(clam)).name == "slides"
        assert whole.names == NAMES
        assert [view.name for view in whole.views] == ["features"]
        assert [(task.name, task.kind, task.labels) for task in whole.tasks] == [
            ("label", "binary", ("normal_tissue", "tumor_tissue")),
            ("age", "regression", None),
        ]
        for index, got in enumerate(whole):
            features, coords = bag(index)
            np.testing.assert_array_equal(got.views["features"], features)
            np.testing.assert_array_equal(got.coords, coords)
            assert got.mask is None
        assert whole.positions.unit == "px"
        assert "CLAM" in splits.description
        assert "by patient" in splits.description

    def test_clam_with_pt_files_only(self, clam):
        for path in (clam / "h5_files").iterdir():
            path.unlink()
        got = load(clam)
        assert got[3].coords is None
        assert got.positions is None
        np.testing.assert_array_equal(got[3].views["features"], bag(3)[0])

    def test_clam_with_some_h5_files(self, clam):
        (clam / "h5_files" / "s03.h5").unlink()
        with pytest.raises(DataError, match=r"pt_files/s03\.pt: expected coordinates as .*h5 has them, got none"):
            load(clam)
        assert load(clam, skip_bad=True).names == [name for name in NAMES if name != "s03"]
        whole = load(clam, match="position")
        assert whole.names == NAMES
        assert whole[0].coords is None

    def test_trident(self, trident):
        for root in (trident, trident / "20x_256px_0px_overlap"):
            whole = load(root, labels=str(trident / "labels.tsv"))
            assert [view.name for view in whole.views] == ["conch_v15", "uni_v1"]
            assert whole.positions.patch_size.tolist() == [512.0] * 12
            self.check_matched(whole)

    @staticmethod
    def check_matched(whole):
        """Features agree at every place, whatever the order in the files was."""
        for index, got in enumerate(whole):
            features, coords = bag(index)
            rows = {tuple(place): row for row, place in enumerate(coords)}
            at = [rows[tuple(place)] for place in got.coords.long().tolist()]
            assert sorted(at) == list(range(len(features)))
            np.testing.assert_array_equal(got.views["uni_v1"], features[at])
            if index == 5:
                assert "conch_v15" not in got.views
                assert got.mask.tolist() == [[False, True]] * len(got)
                continue
            present = got.mask[:, 0]
            assert int((~present).sum()) == 1
            np.testing.assert_array_equal(got.views["conch_v15"][present], features[at][present, :3] + 100)

    def test_stamp(self, tmp_path):
        """Extractors in directories with a hash; slides in folders of their own."""
        for index, name in enumerate(NAMES[:4]):
            features, coords = bag(index)
            for extractor, jitter in (("uni-1a2b3c4d", 0.0), ("virchow2-5e6f7a8b", 0.01)):
                folder = tmp_path / extractor / f"folder{index}"
                write_stamp(folder, name, features, coords / 2 + jitter, extractor.partition("-")[0])
                (folder / f"{name}.jpg").write_bytes(b"thumbnail")
        whole = load(tmp_path)
        assert [view.name for view in whole.views] == ["uni", "virchow2"]
        assert whole.names == NAMES[:4]
        assert (whole.positions.unit, whole.positions.patch_size[0]) == ("um", 256.0)
        assert whole[0].mask is None
        assert whole[0].views["uni"].dtype == torch.float16
        one = load(tmp_path / "uni-1a2b3c4d")
        assert [view.name for view in one.views] == ["uni"]
        assert one.names == NAMES[:4]

    def test_folders_of_slides(self, tmp_path):
        """Sub-directories with different slides of one kind are no views; nor is a run directory."""
        for index, folder in enumerate(("first", "second")):
            (tmp_path / folder).mkdir()
            torch.save(torch.from_numpy(bag(index)[0]), tmp_path / folder / f"s{index}.pt")
        (tmp_path / "runs" / "one").mkdir(parents=True)
        torch.save({"epoch": 1}, tmp_path / "runs" / "one" / "checkpoint.pt")
        (tmp_path / "runs" / "one" / "metrics.jsonl").write_text("")
        whole = load(tmp_path)
        assert ([view.name for view in whole.views], whole.names) == (["features"], ["s0", "s1"])
        torch.save(torch.zeros(3, 7), tmp_path / "second" / "s1.pt")  # another width: another encoder
        assert [(view.name, view.width) for view in load(tmp_path).views] == [("first", 4), ("second", 7)]

    def test_plain_files(self, tmp_path):
        features = bag(0)[0]
        torch.save(torch.from_numpy(features), tmp_path / "a.pt")
        torch.save(torch.from_numpy(features[1:]).half(), tmp_path / "b.pt")
        np.savez(tmp_path / "c.npz", features=features[2:])
        whole = load(tmp_path)
        assert whole.names == ["a", "b", "c"]
        assert {whole[row].views["features"].dtype for row in range(3)} == {torch.float32}  # one float32 makes all so
        assert whole.tasks == ()

    def test_directories_beside_files(self, tmp_path):
        (tmp_path / "old").mkdir()
        for folder in (tmp_path, tmp_path / "old"):
            torch.save(torch.from_numpy(bag(0)[0]), folder / "a.pt")
        assert "not read, as there are files beside: old" in load_source(tmp_path).description

    def test_views_without_coordinates(self, tmp_path):
        features, _ = bag(0)
        for view in ("one", "two"):
            (tmp_path / view).mkdir()
            torch.save(torch.from_numpy(features), tmp_path / view / "a.pt")
        advice = r"--set data\.options\.match=position"
        with pytest.raises(DataError, match=rf"two/a\.pt: expected coordinates to match .*{advice}"):
            load(tmp_path)
        assert load(tmp_path, match="position")[0].mask is None
        torch.save(torch.from_numpy(features[:-1]), tmp_path / "two" / "a.pt")
        with pytest.raises(DataError, match=r"two/a\.pt: expected 9 rows as in .*one/a\.pt, got 8"):
            load(tmp_path, match="position")

    def test_empty_slides(self, tmp_path):
        folder = tmp_path / "features_uni_v1"
        write_trident(folder, "full", *bag(0))
        write_trident(folder, "flat", np.empty((0,), np.float32), np.empty((0, 2)))
        write_trident(folder, "wide", np.empty((0, 4), np.float32), np.empty((0, 2)))
        other = tmp_path / "features_conch"
        write_trident(other, "flat", *bag(1), encoder="conch")
        write_trident(other, "wide", np.empty((0, 4), np.float32), np.empty((0, 2)), "conch")
        whole = load(tmp_path)
        assert whole.names == ["flat", "full", "wide"]
        assert whole.sizes.tolist() == [10, 9, 0]
        batch = whole.collate(list(whole))
        assert batch.ptr.tolist() == [0, 10, 19, 19]
        assert batch.mask.sum(dim=0).tolist() == [10, 9]

    def test_several_views_of_clam(self, tmp_path):
        features, coords = bag(0)
        write_clam(tmp_path / "resnet", "a", features, coords)
        write_clam(tmp_path / "uni", "a", features[::-1], coords[::-1])
        got = load(tmp_path)[0]
        assert list(got.views) == ["resnet", "uni"]
        np.testing.assert_array_equal(got.views["resnet"], got.views["uni"])
        assert list(load(tmp_path, views=["uni"])[0].views) == ["uni"]
        assert list(load(tmp_path, views="uni")[0].views) == ["uni"]
        with pytest.raises(DataError, match="views: expected names among resnet, uni, got 'x'"):
            load(tmp_path, views=["x"])
