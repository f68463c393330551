import numpy as np
import torch
from torch import nn

from tests.train.bags import VIEWS, datasets
from umda_fast.data import BagDataset
from umda_fast.model import UMDA, UMDAConfig
from umda_fast.train.sampling import feature_encoders, sampled_rows

DATA = datasets()["train"]


def test_all_instances_come_if_so_many_are_asked_for() -> None:
    for column, view in enumerate(VIEWS):
        bags = [DATA[index] for index in range(len(DATA))]
        whole = torch.cat([bag.views[view.name][bag.mask[:, column]] for bag in bags])
        found = torch.cat([rows for name, rows in sampled_rows(DATA, 10_000) if name == view.name])
        assert len(found) == len(whole)
        torch.testing.assert_close(found.sort(0).values, whole.sort(0).values, rtol=0, atol=0)


def test_no_bag_is_read_beyond_those_that_are_needed() -> None:
    read: list[int] = []

    class Watched(BagDataset):
        def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
            read.append(index)
            return super().__getitem__(index)

    bags = [DATA[index] for index in range(len(DATA))]
    data = Watched(bags, VIEWS, DATA.tasks)
    found = list(sampled_rows(data, 25, seed=1))
    sizes = [len(bags[index]) for index in read]
    assert sum(sizes) >= 25 > sum(sizes[:-1])
    assert len(set(read)) == len(read)
    assert sum(len(rows) for name, rows in found if name == "a") <= sum(sizes)
    order = list(read)
    read.clear()
    list(sampled_rows(data, 25, seed=2))
    assert read != order


def test_one_view_is_the_same_as_among_all() -> None:
    among = [rows for name, rows in sampled_rows(DATA, 40) if name == "b"]
    alone = list(sampled_rows(DATA, 40, only="b"))
    assert {name for name, _ in alone} == {"b"}
    assert all(torch.equal(here, there) for (_, here), there in zip(alone, among, strict=True))


def test_a_view_that_nobody_has_gives_nothing() -> None:
    mask = np.ones((6, 2), dtype=bool)
    mask[:, 1] = False
    views = {"a": np.zeros((6, 3)), "b": np.full((6, 4), np.nan)}
    data = BagDataset.from_arrays(views, None, {"y": np.arange(6) % 2}, mask=mask)
    assert {name for name, _ in sampled_rows(data, 100)} == {"a"}


def test_encoders_of_the_user_are_not_among_the_default_ones() -> None:
    model = UMDA(UMDAConfig(VIEWS, DATA.tasks, width=16, heads=2), {"a": nn.Linear(4, 16)})
    assert [name for name, _ in feature_encoders(model)] == ["b"]
    assert feature_encoders(nn.Linear(2, 2)) == []
