import json
import random
from itertools import chain

import numpy as np
import pytest
import torch

from umda_fast.data import BagDataset, InstanceBudgetSampler, make_loader

SIZES = np.random.default_rng(0).integers(0, 40, 97)


def make_sampler(**changes):
    return InstanceBudgetSampler(**{"sizes": SIZES, "budget": 64, "seed": 3, **changes})


@pytest.fixture(scope="module")
def dataset():
    ptr = np.concatenate([[0], SIZES.cumsum()])
    return BagDataset.from_arrays({"x": np.arange(2.0 * ptr[-1]).reshape(-1, 2)}, ptr, {"y": SIZES % 2})


class TestBatches:
    @pytest.mark.parametrize("max_bags", [None, 3])
    @pytest.mark.parametrize("budget", [1, 39, 64, 10_000])
    def test_every_bag_once_within_the_budget(self, budget, max_bags):
        sampler = make_sampler(budget=budget, max_bags=max_bags)
        batches = list(sampler)
        assert sorted(chain.from_iterable(batches)) == list(range(len(SIZES)))
        for batch in batches:
            assert len(batch) == 1 or SIZES[batch].sum() <= budget
            assert max_bags is None or len(batch) <= max_bags

    def test_batches_are_filled(self):
        for first, second in zip(batches := list(make_sampler()), batches[1:], strict=False):
            assert SIZES[first].sum() + SIZES[second[0]] > 64

    def test_a_bag_larger_than_the_budget_is_alone(self):
        batches = list(InstanceBudgetSampler([5, 200, 5], 20, shuffle=False))
        assert batches == [[0], [1], [2]]

    def test_empty_bags_cost_nothing(self):
        assert list(InstanceBudgetSampler([0, 0, 4, 0], 4, shuffle=False)) == [[0, 1, 2, 3]]

    def test_no_bags(self):
        sampler = InstanceBudgetSampler([], 4)
        assert len(sampler) == 0
        assert list(sampler) == []

    def test_without_shuffle_the_order_is_kept(self):
        sampler = make_sampler(shuffle=False)
        assert list(chain.from_iterable(sampler)) == list(range(len(SIZES)))
        assert list(sampler) == list(sampler)

    def test_the_order_is_the_same_on_every_machine(self):
        sampler = InstanceBudgetSampler([1] * 8, 3, seed=7)
        assert list(sampler) == [[7, 5, 3], [0, 6, 1], [2, 4]]
        assert list(sampler) == [[3, 1, 2], [7, 4, 5], [6, 0]]

    def test_length_is_that_of_the_epoch(self):
        sampler = make_sampler()
        for epoch in range(4):
            sampler.set_epoch(epoch)
            assert len(sampler) == sampler.num_batches(epoch) == len(sampler.batches(epoch))

    @pytest.mark.parametrize("replicas", [2, 3, 5])
    def test_processes_share_every_batch(self, replicas):
        everything = make_sampler().batches(0)
        parts = [make_sampler(replicas=replicas, rank=rank) for rank in range(replicas)]
        assert {len(part) for part in parts} == {len(everything)}
        for batch, *shares in zip(everything, *(part.batches(0) for part in parts), strict=True):
            assert sorted(chain.from_iterable(shares)) == sorted(batch)
            for share in shares:
                assert [index for index in batch if index in share] == share
            # Nobody has more than another by more than a bag, the last it was given.
            loads = [SIZES[share].sum() for share in shares]
            largest = max(SIZES[batch])
            assert max(loads) - min(loads) <= largest

    def test_shares_are_dealt_out_by_instances_not_by_bags(self):
        shares = [
            InstanceBudgetSampler([60, 10, 20, 5, 5, 20, 0, 0], 200, shuffle=False, replicas=2, rank=rank)
            for rank in range(2)
        ]
        assert [share.batches(0) for share in shares] == [[[0, 6, 7]], [[1, 2, 3, 4, 5]]]

    def test_a_process_may_have_no_bag_of_a_batch(self):
        sampler = InstanceBudgetSampler([5, 5], 5, shuffle=False, replicas=2, rank=1)
        assert list(sampler) == [[], []]

    def test_a_position_fits_any_number_of_processes(self):
        sampler = make_sampler(replicas=2, rank=1)
        iterator = iter(sampler)
        for _ in range(5):
            next(iterator)
        other = make_sampler()
        other.load_state_dict(sampler.state_dict())
        assert list(other) == make_sampler().batches(0)[5:]

class TestPosition:
    def test_epochs_follow_one_another(self):
        sampler, other = make_sampler(), make_sampler()
        first, second = list(sampler), list(sampler)
        assert first != second
        other.set_epoch(1)
        assert list(other) == second
        assert (sampler.epoch, sampler.position) == (2, 0)

    def test_starting_over_repeats_the_epoch(self):
        sampler = make_sampler()
        first = next(iter(sampler))
        assert sampler.position == 1
        assert next(iter(sampler)) == first

    @pytest.mark.parametrize("taken", [0, 1, 17])
    def test_resume_gives_the_remaining_batches_then_the_next_epoch(self, taken):
        sampler = make_sampler()
        sampler.set_epoch(4)
        iterator = iter(sampler)
        for _ in range(taken):
            next(iterator)
        state = json.loads(json.dumps(sampler.state_dict()))
        rest, following = list(iterator), list(sampler)

        resumed = make_sampler()
        resumed.load_state_dict(state)
        resumed.set_epoch(4)
        assert list(resumed) == rest
        assert list(resumed) == following

    def test_resume_at_the_very_end_gives_nothing_then_the_next_epoch(self):
        sampler = make_sampler()
        iterator = iter(sampler)
        for _ in range(len(sampler)):
            next(iterator)
        resumed = make_sampler()
        resumed.load_state_dict(sampler.state_dict())
        assert list(resumed) == []
        assert list(resumed) == sampler.batches(1)

    def test_choosing_another_epoch_forgets_the_position(self):
        sampler = make_sampler()
        sampler.load_state_dict({**sampler.state_dict(), "position": 5})
        sampler.set_epoch(1)
        assert list(sampler) == sampler.batches(1)

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"seed": 4}, "seed"),
            ({"budget": 65}, "budget"),
            ({"sizes": SIZES[1:]}, "sizes"),
            ({"max_bags": 2}, "max"),
        ],
    )
    def test_a_state_of_other_batches_is_refused(self, changes, name):
        with pytest.raises(ValueError, match=f"state: expected {name}"):
            make_sampler(**changes).load_state_dict(make_sampler().state_dict())


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"sizes": [1.5]}, TypeError, "sizes: expected integers"),
            ({"sizes": [[1]]}, TypeError, "sizes: expected integers"),
            ({"sizes": [1, -1]}, ValueError, "sizes: expected non-negative"),
            ({"budget": 0}, ValueError, "budget: expected at least 1, got 0"),
            ({"budget": 2.0}, TypeError, "budget: expected an int"),
            ({"seed": -1}, ValueError, "seed: expected at least 0"),
            ({"max_bags": 0}, ValueError, "max_bags: expected at least 1"),
            ({"replicas": 2, "rank": 2}, ValueError, "rank: expected less than replicas = 2, got 2"),
        ],
    )
    def test_bad(self, changes, error, message):
        with pytest.raises(error, match=message):
            make_sampler(**changes)


class TestLoader:
    def test_hands_out_the_sampler_s_batches(self, dataset):
        sampler = make_sampler()
        loader = make_loader(dataset, sampler, pin=False)
        expected = sampler.batches(0)
        assert len(loader) == len(expected)
        for batch, indices in zip(loader, expected, strict=True):
            assert batch.names == [dataset.names[index] for index in indices]
            assert batch.num_instances == SIZES[indices].sum()
        assert sampler.state_dict()["epoch"] == 1

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resumes_exactly_though_workers_read_ahead(self, dataset, workers):
        sampler = make_sampler()
        iterator = iter(make_loader(dataset, sampler, workers=workers, pin=False))
        for _ in range(5):
            next(iterator)
        state = sampler.state_dict()
        rest = [batch.names for batch in iterator]

        resumed = make_sampler()
        resumed.load_state_dict(state)
        loader = make_loader(dataset, resumed, workers=workers, pin=False)
        assert [batch.names for batch in loader] == rest
        following = [[dataset.names[index] for index in batch] for batch in resumed.batches(1)]
        assert [batch.names for batch in loader] == following
        assert (resumed.epoch, resumed.position) == (2, 0)

    def test_leaves_the_process_s_random_state_alone(self, dataset):
        before = torch.get_rng_state(), random.getstate()
        list(make_loader(dataset, make_sampler(), pin=False))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]

    @pytest.mark.skipif(not torch.accelerator.is_available(), reason="pinned memory needs an accelerator")
    def test_pins(self, dataset):
        batch = next(iter(make_loader(dataset, make_sampler())))
        tensors = [batch.mask, batch.ptr, *batch.views.values(), *batch.labels.values()]
        assert all(tensor.is_pinned() for tensor in tensors)
        moved = batch.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(moved.views["x"].cpu(), batch.views["x"])

    def test_bad_arguments(self, dataset):
        with pytest.raises(ValueError, match="sampler: expected one for the 97 bags of 'arrays', got 96"):
            make_loader(dataset, make_sampler(sizes=SIZES[1:]))
        with pytest.raises(ValueError, match="workers: expected at least 0"):
            make_loader(dataset, make_sampler(), workers=-1)
