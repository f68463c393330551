"""Bags by patient: slides that make one bag together, each with coordinates of its own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.slide_files import NAMES, bag, grid, write_clam, write_labels, write_trident
from umda_fast.data import Bag, BagBatch, Splits, collate, inspect_source, load_folds, load_source
from umda_fast.data.files.pack import pack_slides
from umda_fast.data.labels import UnneededLabels
from umda_fast.data.thinning import drop_instances
from umda_fast.errors import DataError
from umda_fast.model import UMDA, UMDAConfig, ViewSpec
from umda_fast.model.chunked import forward_chunked
from umda_fast.model.gmip import GMIP
from umda_fast.runtime.config import DataConfig
from umda_fast.train.split_record import bag_contents

PATIENTS = [f"p{index // 2}" for index in range(12)]


def by_patient(root: Path, **options: object) -> Splits:
    return load_source(root, bag="patient", **options)


def table(root: Path, **columns: list[object]) -> Path:
    return write_labels(root / "labels.csv", {"case_id": PATIENTS, "slide_id": NAMES, **columns})


@pytest.fixture
def clam(clam: Path) -> Path:
    """Two slides of each of six patients, and labels of patients."""
    table(clam, label=["tumor", "tumor", "normal", "normal"] * 3)
    return clam


class TestBags:
    def test_instances_are_those_of_the_slides(self, clam: Path) -> None:
        slides, whole = load_source(clam).whole, by_patient(clam).whole
        assert whole.names == [f"p{number}" for number in range(6)]
        assert whole.sizes.tolist() == slides.sizes.reshape(6, 2).sum(1).tolist()
        first, second, joined = slides[4], slides[5], whole[2]
        (view,) = joined.views
        assert torch.equal(joined.views[view], torch.cat([first.views[view], second.views[view]]))
        assert torch.equal(joined.coords, torch.cat([first.coords, second.coords]))
        assert joined.slides.tolist() == [0] * len(first) + [1] * len(second)
        of_one = whole.subset([2]).slides
        assert of_one is not None
        assert of_one.names(0) == ["s04", "s05"]

    def test_labels_are_those_of_patients(self, clam: Path) -> None:
        table(clam, grade=["abc"[index // 2 % 3] if index != 4 else "" for index in range(12)])
        whole = by_patient(clam).whole
        assert [task.kind for task in whole.tasks] == ["multiclass"]
        assert whole.labels["grade"].tolist() == [0, 1, 2, 0, 1, 2]  # that of s05 is known of p2

    def test_views_that_a_slide_lacks(self, trident: Path) -> None:
        (trident / "labels.tsv").unlink()
        table(trident, grade=list("112233112233"))
        whole = by_patient(trident).whole
        joined = whole[2]  # of s04, and s05 without conch
        assert joined.mask is not None
        column = [view.name for view in whole.views].index("conch_v15")
        slides = joined.slides
        assert slides is not None
        assert not joined.mask[slides == 1, column].any()
        assert joined.mask[slides == 0, column].sum() == (slides == 0).sum() - 1

    def test_a_slide_of_nobody_is_a_bag_of_its_own(self, clam: Path) -> None:
        write_labels(
            clam / "labels.csv",
            {"patient": ["A", "A", *[""] * 10], "slide": NAMES, "y": [0, 0, *[1, 0] * 5]},
        )
        splits = by_patient(clam)
        assert splits.whole.names == ["A", *NAMES[2:]]
        assert splits.groups is not None
        assert splits.groups[:2] == ["patient A", "slide s02"]

    def test_a_name_of_both_is_refused(self, clam: Path) -> None:
        write_labels(
            clam / "labels.csv", {"patient": ["s02", "s02", *[""] * 10], "slide": NAMES, "y": [0, 0, *[1, 0] * 5]}
        )
        with pytest.raises(DataError, match="slide 's02' has no patient and the name of one"):
            by_patient(clam)

    def test_a_table_of_patients(self, clam: Path) -> None:
        names = [f"TCGA-{number}" for number in range(6)]
        for index, name in enumerate(NAMES):
            (clam / "h5_files" / f"{name}.h5").rename(clam / "h5_files" / f"TCGA-{index // 2}-{index % 2}.h5")
            (clam / "pt_files" / f"{name}.pt").unlink()
        write_labels(clam / "labels.csv", {"patient": names, "y": [0, 1] * 3})
        whole = by_patient(clam).whole
        assert whole.names == names
        assert whole.labels["y"].tolist() == [0, 1] * 3

    def test_content_is_the_same_in_any_order_of_slides(self, clam: Path, tmp_path: Path) -> None:
        config = DataConfig(source=str(clam))
        before = bag_contents(by_patient(clam).whole, config)
        (clam / "h5_files" / "s00.h5").rename(clam / "h5_files" / "zz.h5")
        (clam / "pt_files" / "s00.pt").unlink()
        names = ["zz", *NAMES[1:]]
        write_labels(clam / "labels.csv", {"case_id": PATIENTS, "slide_id": names, "y": [0, 0, 1, 1] * 3})
        after = by_patient(clam).whole
        assert dict(zip(after.names, bag_contents(after, config), strict=True)) == dict(
            zip([f"p{number}" for number in range(6)], before, strict=True)
        )


class TestWrongTables:
    def test_labels_that_differ_are_one_line(self, clam: Path) -> None:
        table(clam, grade=["low", "high", *["low", "low", "high", "high"] * 2, "low", "low"])
        expected = (
            r"labels.csv: column 'grade': expected one value for all slides of patient 'p0' \(bag=patient\), "
            r"got 'low' and 'high'; leave it out with data.options.ignore"
        )
        with pytest.raises(DataError, match=expected):
            by_patient(clam)
        assert by_patient(clam, ignore=["grade"]).tasks == ()

    def test_labels_that_are_not_needed_may_differ(self, clam: Path) -> None:
        table(clam, grade=["low", "high", *["low", "low", "high", "high"] * 2, "low", "low"])
        tasks = UnneededLabels(load_source(clam).tasks)
        labels = by_patient(clam, kinds=tasks).whole.labels["grade"]
        assert np.isnan(labels[0])
        assert not np.isnan(labels[1:]).any()
        assert "patient 'p0'" in tasks.ignored[0]

    def test_numbers_written_in_two_ways_are_the_same(self, clam: Path) -> None:
        table(clam, age=[f"{40 + index // 2}{'.0' if index % 2 else ''}" for index in range(12)])
        assert by_patient(clam, kinds={"age": "regression"}).whole.labels["age"].tolist() == [*range(40, 46)]

    def test_metadata_that_differs(self, clam: Path) -> None:
        table(clam, y=[0, 0, 1, 1] * 3, thickness=[4, 5] * 6)
        with pytest.raises(DataError, match=r"column 'thickness': .*patient 'p0'.*leave it out of data.options.metada"):
            by_patient(clam, metadata=["thickness"])

    def test_what_names_slides_is_no_fault(self, clam: Path) -> None:
        table(clam, y=[0, 0, 1, 1] * 3, barcode=[f"B{index:03}" for index in range(12)])
        splits = by_patient(clam)
        assert [task.name for task in splits.tasks] == ["y"]
        assert {use.name: use.use for use in splits.about.columns}["barcode"] == "left out"
        assert inspect_source(clam, bag="patient").faults == []

    @pytest.mark.parametrize("there", [False, True])
    def test_nobody_says_whose_slides_they_are(self, clam: Path, there: bool) -> None:
        (clam / "labels.csv").unlink()
        if there:
            write_labels(clam / "labels.csv", {"slide_id": NAMES, "y": [0, 1] * 6})
        with pytest.raises(DataError, match=f"there is no {'column' if there else 'table'} that says whose the slides"):
            by_patient(clam)

    def test_what_a_bag_is(self, clam: Path) -> None:
        with pytest.raises(DataError, match="bag: expected slide or patient, got 'case'"):
            load_source(clam, bag="case")


class TestSplits:
    def test_of_the_table(self, clam: Path) -> None:
        table(clam, y=[0, 0, 1, 1] * 3, split=["train"] * 6 + ["val"] * 2 + ["test"] * 4)
        splits = by_patient(clam)
        assert {split: dataset.names for split, dataset in splits.items()} == {
            "train": ["p0", "p1", "p2"], "val": ["p3"], "test": ["p4", "p5"],
        }  # fmt: skip
        table(clam, y=[0, 0, 1, 1] * 3, split=["train", "test"] * 6)
        with pytest.raises(DataError, match="patient p0: expected in one split, got train and test"):
            by_patient(clam).check()

    def test_of_clam(self, clam: Path) -> None:
        (clam / "splits_0.csv").write_text(
            ",train,val,test\n0,s00,s06,s08\n1,s01,s07,s09\n2,s02,,s10\n3,s03,,s11\n4,s04,,\n5,s05,,\n"
        )
        assert {split: dataset.names for split, dataset in by_patient(clam).items()} == {
            "train": ["p0", "p1", "p2"], "val": ["p3"], "test": ["p4", "p5"],
        }  # fmt: skip

    def test_folds(self, clam: Path) -> None:
        folds = list(load_folds(clam, folds=3, bag="patient"))
        tested = sorted(name for fold in folds for name in fold.test.names)
        assert tested == [f"p{number}" for number in range(6)]

    def test_a_packed_directory(self, clam: Path, tmp_path: Path) -> None:
        pack_slides(clam, tmp_path / "packed")
        for one, other in zip(by_patient(clam).whole, by_patient(tmp_path / "packed").whole, strict=True):
            assert one.name == other.name
            assert torch.equal(one.slides, other.slides)
            assert all(torch.equal(one.views[view], other.views[view]) for view in one.views)


class TestFrames:
    def batch(self, root: Path, rows: list[int]) -> BagBatch:
        whole = by_patient(root).whole
        return collate([whole[row] for row in rows], whole.views, whole.tasks)

    def test_frames_are_the_slides(self, clam: Path) -> None:
        sizes = load_source(clam).whole.sizes
        batch = self.batch(clam, [1, 4])
        expected = np.cumsum([0, *sizes[2:4], *sizes[8:10]])
        assert batch.frames.tolist() == expected.tolist()
        assert "frames" in batch.inputs()
        thinned = drop_instances(batch, 0.5)
        ends = thinned.frames.tolist()
        assert ends[0] == 0
        assert ends[-1] == thinned.num_instances
        assert set(thinned.ptr.tolist()) <= set(ends)
        # Coordinates are told apart by slide: what is left of each is part of what it had.
        for (a, b), (c, d) in zip(pairwise(ends), pairwise(expected), strict=True):
            there = {tuple(row) for row in batch.coords[c:d].tolist()}
            assert {tuple(row) for row in thinned.coords[a:b].tolist()} <= there

    def test_bags_of_one_slide_have_none(self, clam: Path) -> None:
        whole = load_source(clam).whole
        batch = collate([whole[0], whole[1]], whole.views, whole.tasks)
        assert batch.frames is None
        assert "frames" not in batch.inputs()

    def test_a_bag_without_instances_and_one_of_one_slide(self) -> None:
        bags = [
            Bag("a", {"x": torch.ones(3, 2)}, slides=torch.tensor([0, 0, 2])),
            Bag("b", {"x": torch.ones(0, 2)}, slides=torch.zeros(0, dtype=torch.int64)),
            Bag("c", {"x": torch.ones(2, 2)}),
        ]
        assert collate(bags, [ViewSpec("x", 2)], []).frames.tolist() == [0, 2, 3, 3, 5]

    @pytest.mark.parametrize("slides", [torch.tensor([1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])])
    def test_wrong_slides(self, slides: torch.Tensor) -> None:
        with pytest.raises(DataError, match=r"slides: expected int64 \[2\], ascending"):
            Bag("a", {"x": torch.ones(2, 2)}, slides=slides)

    def test_no_edge_by_coordinates_joins_two_slides(self) -> None:
        torch.manual_seed(0)
        n = 8
        coords = torch.tensor(grid(np.random.default_rng(0), n), dtype=torch.float32)
        coords = coords.repeat(2, 1)  # on top of each other
        z, ptr, frames = torch.randn(2 * n, 16), torch.tensor([0, 2 * n]), torch.tensor([0, n, 2 * n])
        block = GMIP(16, k=1, coords_k=2, dropout=0.0).eval()
        with torch.no_grad():
            apart = block(z, ptr, coords, frames).graph.to_edge_index()[0]
            together = block(z, ptr, coords).graph.to_edge_index()[0]
        by_features = GMIP(16, k=1, coords_k=0, dropout=0.0).eval()
        by_features.load_state_dict(block.state_dict())
        own = {tuple(edge) for edge in by_features(z, ptr).graph.to_edge_index()[0].T.tolist()}

        def crossing(edges: torch.Tensor) -> set[tuple[int, ...]]:
            return {tuple(edge) for edge in edges.T.tolist() if (edge[0] < n) != (edge[1] < n)} - own

        assert not crossing(apart)
        assert crossing(together)  # what the frames are for

    def test_the_model_takes_them_in_chunks_too(self, clam: Path) -> None:
        splits = by_patient(clam)
        torch.manual_seed(0)
        config = UMDAConfig(views=splits.views, tasks=splits.tasks, width=16, heads=2, layers=1, graph_k=1, coords_k=2)
        model = UMDA(config).eval()
        batch = self.batch(clam, [0, 1, 2])
        with torch.no_grad():
            whole = model(**batch.inputs())
            chunked = forward_chunked(model, **batch.inputs(), chunk=7)
            merged = model(**{**batch.inputs(), "frames": None})
        for task in splits.tasks:
            torch.testing.assert_close(whole.logits[task.name], chunked.logits[task.name])
        edges = [{tuple(edge) for edge in out.graph.to_edge_index()[0].T.tolist()} for out in (whole, chunked, merged)]
        assert edges[0] == edges[1] != edges[2]


def test_sizes_of_patches_that_slides_agree_in(tmp_path: Path) -> None:
    for index in range(4):
        features, coords = bag(index)
        size = 512 if index < 3 else 256
        write_trident(tmp_path / "features", f"s{index}", features, coords * (size // 256), patch_size_level0=size)
    write_labels(
        tmp_path / "labels.csv", {"patient": list("AABB"), "slide": [f"s{i}" for i in range(4)], "y": [0, 0, 1, 1]}
    )
    positions = by_patient(tmp_path).whole.positions
    assert positions is not None
    assert positions.patch_size[0] == 512
    assert np.isnan(positions.patch_size[1])


def test_writing_is_the_same_as_by_hand(tmp_path: Path) -> None:
    """A patient of one slide is that slide."""
    for index in range(3):
        write_clam(tmp_path, f"s{index}", *bag(index))
    write_labels(tmp_path / "labels.csv", {"patient": list("ABC"), "slide": ["s0", "s1", "s2"], "y": [0, 1, 0]})
    for one, other in zip(load_source(tmp_path).whole, by_patient(tmp_path).whole, strict=True):
        assert torch.equal(next(iter(one.views.values())), next(iter(other.views.values())))
        assert one.labels == other.labels
