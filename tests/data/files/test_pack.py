"""The packed layout: the same bags, whole or not at all, resumable, and wrong bytes found."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from tests.slide_files import grid, write_labels, write_trident
from umda_fast.data import find_format, load_source, make_loader, pack_slides
from umda_fast.data.sampler import InstanceBudgetSampler
from umda_fast.errors import DataError

NAMES = [f"s{index}" for index in range(8)]


@pytest.fixture
def slides(tmp_path):
    """Two encoders in float32 and float16, rows and a slide missing, an empty slide, labels and splits."""
    root = tmp_path / "slides"
    for index, name in enumerate(NAMES):
        rng = np.random.default_rng(index)
        n = 0 if index == 6 else 20 + index
        features, coords = rng.normal(size=(n, 5)), grid(rng, n)
        write_trident(root / "features_uni", name, features.astype(np.float32), coords, "uni", mpp=0.25)
        if index != 2:
            part = slice(index % 3, None)
            write_trident(
                root / "features_conch", name, features[part, :3].astype(np.float16), coords[part], "conch", mpp=0.25
            )
    write_labels(root / "labels.csv", {"patient": list("aabbccdd"), "slide": NAMES, "y": [0, 1] * 4})
    (root / "splits").mkdir()
    (root / "splits" / "splits_0.csv").write_text(",train,val,test\n0,s0,s4,s6\n1,s1,s5,s7\n2,s2,,\n")
    return root


def same(ours, theirs):
    assert ours.names == theirs.names
    assert ours.views == theirs.views
    assert ours.tasks == theirs.tasks
    np.testing.assert_array_equal(ours.sizes, theirs.sizes)
    np.testing.assert_array_equal(ours.positions.patch_size, theirs.positions.patch_size)
    np.testing.assert_array_equal(ours.positions.pixel_size, theirs.positions.pixel_size)
    assert ours.positions.unit == theirs.positions.unit
    for index in range(len(ours)):
        left, right = ours.collate([ours[index]]), theirs.collate([theirs[index]])
        assert torch.equal(left.mask, right.mask)
        assert torch.equal(left.coords, right.coords)
        for view in left.views:
            if left.mask.any():
                assert left.views[view].dtype == right.views[view].dtype
            assert torch.equal(left.views[view], right.views[view])


def test_under_its_first_name() -> None:
    from umda_fast.data.pack import pack_slides as first

    assert first is pack_slides


def test_the_same_bags(slides, tmp_path):
    result = pack_slides(slides, tmp_path / "packed")
    assert (result.bags, result.resumed, result.skipped) == (8, 0, ())
    assert find_format(str(tmp_path / "packed")).name == "pack"
    before, after = load_source(slides), load_source(tmp_path / "packed")
    same(before.whole, after.whole)
    assert [part.names for part in before.values()] == [part.names for part in after.values()]
    assert {view: after.whole[0].views[view].dtype for view in ("uni", "conch")} == {
        "uni": torch.float32,
        "conch": torch.float16,
    }
    assert not list(tmp_path.glob("*.partial"))
    stored = sum(path.stat().st_size for path in (tmp_path / "packed").glob("view_*.bin"))
    rows = {
        "uni": sum(20 + n for n in range(8) if n != 6),
        "conch": sum(20 + n - n % 3 for n in range(8) if n not in (2, 6)),
    }
    assert stored == rows["uni"] * 5 * 4 + rows["conch"] * 3 * 2  # missing rows take no place


def test_reading(slides, tmp_path):
    pack_slides(slides, tmp_path / "packed")
    whole = load_source(tmp_path / "packed").whole
    first = whole[0].views["uni"]
    kept = first.clone()
    first.zero_()  # stays in this process's copy of the page, or another reader would see it
    assert torch.equal(load_source(tmp_path / "packed").whole[0].views["uni"], kept)
    again = pickle.loads(pickle.dumps(load_source(tmp_path / "packed").whole))
    assert torch.equal(again[0].views["uni"], kept)
    batches = list(make_loader(again, InstanceBudgetSampler(again.sizes, 64, shuffle=False), workers=2, pin=False))
    assert [name for batch in batches for name in batch.names] == NAMES
    one = load_source(tmp_path / "packed", views=["conch"]).whole
    assert [view.name for view in one.views] == ["conch"]
    assert one.names == [name for name in NAMES if name != "s2"]  # which lacks the view altogether
    assert (
        one.sizes.tolist() == load_source(slides, views=["conch"]).whole.sizes.tolist() == [20, 20, 23, 23, 23, 0, 26]
    )
    same(load_source(slides, views=["conch"]).whole, one)


def test_stopped_and_continued(slides, tmp_path, monkeypatch):
    pack_slides(slides, tmp_path / "straight")

    class Stop(Exception):
        pass

    def stop_at(count):
        def progress(done, bags, instances):
            if done == count:
                raise Stop

        return progress

    out, partial = tmp_path / "packed", tmp_path / "packed.partial"
    with pytest.raises(Stop):
        pack_slides(slides, out, progress=stop_at(3))
    assert not out.exists()
    for name in ("view_0.bin", "view_1.bin", "coords.bin", "mask.bin"):
        with open(partial / name, "ab") as file:
            file.write(b"half of the next bag")
    with open(partial / "journal.jsonl", "a") as file:
        file.write('{"name": "s3", "si')
    with pytest.raises(Stop):
        pack_slides(slides, out, progress=stop_at(5))
    # What a power cut may do: the journal knows of a bag whose data is not there.
    with open(partial / "view_1.bin", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    result = pack_slides(slides, out)
    assert result.resumed == 4
    for path in (tmp_path / "straight").rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(tmp_path / "straight")).read_bytes() == path.read_bytes(), path.name


def test_starts_anew_when_a_file_changed(slides, tmp_path):
    def stop(done, bags, instances):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_slides(slides, tmp_path / "packed", progress=stop)
    rng = np.random.default_rng(50)
    write_trident(slides / "features_uni", "s0", rng.normal(size=(7, 5)).astype(np.float32), grid(rng, 7), "uni")
    (slides / "features_conch" / "s0.h5").unlink()
    assert pack_slides(slides, tmp_path / "packed").resumed == 0
    same(load_source(slides).whole, load_source(tmp_path / "packed").whole)


@pytest.mark.parametrize("file", ["view_0.bin", "view_1.bin", "coords.bin", "mask.bin"])
def test_wrong_bytes(slides, tmp_path, file):
    packed = tmp_path / "packed"
    pack_slides(slides, packed)
    path = packed / file
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    splits = load_source(packed, skip_bad=True)
    assert len(splits.whole) == 7
    assert f"{file}: bag" in splits.skipped[0]
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{file}: truncated or of another pack: expected {len(whole)} bytes"):
        load_source(packed)
    path.unlink()
    with pytest.raises(DataError, match=rf"{file}: expected a part of a packed directory"):
        load_source(packed)


def test_bad_files_are_left_out(slides, tmp_path):
    (slides / "features_uni" / "s1.h5").write_bytes(b"")
    (slides / "features_conch" / "s1.h5").write_bytes(b"")
    with pytest.raises(DataError, match=r"s1\.h5: corrupt"):
        pack_slides(slides, tmp_path / "packed")
    result = pack_slides(slides, tmp_path / "packed", skip_bad=True)
    assert result.bags == 7
    assert len(result.skipped) == 2
    splits = load_source(tmp_path / "packed")  # nothing is wrong any more
    assert splits.skipped == ()
    assert splits.train.names == ["s0", "s2"]


def test_refused(slides, tmp_path):
    pack_slides(slides, tmp_path / "packed")
    with pytest.raises(DataError, match=r"packed: expected a directory to make, got one that is there"):
        pack_slides(slides, tmp_path / "packed")
    with pytest.raises(DataError, match=r"packed: expected a directory of bags, one file each"):
        pack_slides(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(DataError, match="nowhere: expected a directory of bags"):
        pack_slides("nowhere", tmp_path / "again")
    with pytest.raises(DataError, match="mpp: expected when packing"):
        load_source(tmp_path / "packed", mpp=0.5)
    with pytest.raises(DataError, match="views: expected names among conch, uni, got 'x'"):
        load_source(tmp_path / "packed", views=["x"])
    manifest = tmp_path / "packed" / "umda_fast_pack.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "version": 0}))
    with pytest.raises(DataError, match=r"expected version 1 of the packed layout, got 0; pack again"):
        load_source(tmp_path / "packed")
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"umda_fast_pack\.json: expected what `umda-fast pack` writes"):
        load_source(tmp_path / "packed")
