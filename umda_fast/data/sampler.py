"""Batches by number of instances, not of bags, and a loader that knows where it stands."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler

from umda_fast.data.arrays import IntArray
from umda_fast.data.batch import BagBatch
from umda_fast.data.dataset import BagDataset
from umda_fast.data.draws import Stream, generator, permutation


class InstanceBudgetSampler(Sampler[list[int]]):
    """Batches of bag indices holding at most `budget` instances; an epoch has every bag exactly once.

    Bags are taken in order (shuffled anew every epoch) until the next would exceed the budget; a bag larger
    than the budget is a batch of its own. The order is drawn from PCG64 by seed and epoch, the same on every
    machine.

    The position is exact: `state_dict` between two batches and `load_state_dict` elsewhere give the remaining
    batches of the epoch, then the following epochs. Iterating to the end goes on to the next epoch; starting
    over before the end repeats the epoch. A `BagLoader` with workers, which asks for batches ahead of time,
    keeps the position of the batches it has handed out.

    Args:
        sizes: instances of every bag, integers [B].
        budget: at most this many instances in a batch of more than one bag.
        shuffle: a new order every epoch; False keeps the order given.
        seed: non-negative.
        max_bags: at most this many bags in a batch.
        replicas, rank: with several processes, which batches are made does not change, nor what the budget means:
            each batch is dealt out among them, and this process gets its share of every one. Whole bags, the
            largest first, go to whoever has the fewest instances so far, so that no process waits long for
            another; a share may be empty. The position counts batches, so it fits any number of processes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        sizes: Sequence[int] | npt.NDArray[np.integer[Any]],
        budget: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        max_bags: int | None = None,
        replicas: int = 1,
        rank: int = 0,
    ) -> None:
        array = np.asarray(sizes)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"sizes: expected integers [B], got {array.dtype} {list(array.shape)}")
        if array.size and array.min() < 0:
            raise ValueError(f"sizes: expected non-negative numbers, got {array.min()}")
        _check_at_least("budget", budget, 1)
        _check_at_least("seed", seed, 0)
        _check_at_least("max_bags", 1 if max_bags is None else max_bags, 1)
        _check_at_least("replicas", replicas, 1)
        _check_at_least("rank", rank, 0)
        if rank >= replicas:
            raise ValueError(f"rank: expected less than replicas = {replicas}, got {rank}")
        self.sizes = array.astype(np.int64)
        self.budget = budget
        self.shuffle = shuffle
        self.seed = seed
        self.max_bags = max_bags
        self.replicas = replicas
        self.rank = rank
        self._epoch = 0
        self._position = 0  # batches of this epoch handed out
        self._resume = False  # the next iteration starts at the position, not at the first batch
        self._packed: tuple[int, list[IntArray]] | None = None  # an epoch and its batches

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def position(self) -> int:
        """Batches of this epoch handed out so far."""
        return self._position

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next; another one than the present starts at its first batch."""
        _check_at_least("epoch", epoch, 0)
        if epoch != self._epoch:
            self.move_to(epoch, 0)

    def move_to(self, epoch: int, position: int) -> None:
        """Say how many batches of which epoch have been handed out."""
        self._epoch, self._position, self._resume = epoch, position, False

    def resume_at(self, epoch: int, position: int) -> None:
        """Let the next iteration begin at a batch of an epoch."""
        self.move_to(epoch, position)
        self._resume = True

    def start(self) -> tuple[int, int]:
        """Epoch and first batch of the iteration that begins now."""
        if not self._resume:
            self._position = 0
        self._resume = False
        return self._epoch, self._position

    def batches(self, epoch: int) -> list[list[int]]:
        """This process's share of every batch of an epoch."""
        return [batch.tolist() for batch in self._batches(epoch)]

    def num_batches(self, epoch: int) -> int:
        """How many batches an epoch has. With `shuffle` it varies a little between epochs."""
        return len(self._batches(epoch))

    def __len__(self) -> int:
        return self.num_batches(self._epoch)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.start()
        batches = self.batches(epoch)
        for index in range(start, len(batches)):
            self.move_to(epoch, index + 1)
            yield batches[index]
        self.move_to(epoch + 1, 0)

    def _batches(self, epoch: int) -> list[IntArray]:
        if self._packed is None or self._packed[0] != epoch:
            self._packed = epoch, self._pack(epoch)
        return self._packed[1]

    def _pack(self, epoch: int) -> list[IntArray]:
        bags = len(self.sizes)
        order = np.arange(bags, dtype=np.int64)
        if self.shuffle:
            order = permutation(generator(Stream.SHUFFLE, self.seed, epoch), bags)
        ends = self.sizes[order].cumsum()
        batches = []
        first, before = 0, 0
        while first < bags:
            stop = int(np.searchsorted(ends, before + self.budget, side="right"))
            stop = max(stop, first + 1)
            if self.max_bags is not None:
                stop = min(stop, first + self.max_bags)
            batches.append(order[first:stop])
            first, before = stop, int(ends[stop - 1])
        return batches if self.replicas == 1 else [self._share(batch) for batch in batches]

    def _share(self, batch: IntArray) -> IntArray:
        """The bags of `batch` that this process gets, in the batch's order (longest-processing-time rule)."""
        sizes = self.sizes[batch]
        loads = [(0, 0, rank) for rank in range(self.replicas)]  # instances, bags
        mine = []
        for index in np.argsort(-sizes, kind="stable"):
            instances, bags, rank = heapq.heappop(loads)
            heapq.heappush(loads, (instances + int(sizes[index]), bags + 1, rank))
            if rank == self.rank:
                mine.append(index)
        return batch[np.sort(np.array(mine, dtype=np.int64))]

    def _settings(self) -> dict[str, int | bool | str | None]:
        return {
            "budget": self.budget,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "max_bags": self.max_bags,
            "sizes": hashlib.sha256(self.sizes.astype("<i8").tobytes()).hexdigest(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Position and settings, plain data."""
        return {"epoch": self._epoch, "position": self._position, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the state is of a sampler with other settings or other bags, which has other batches.
        """
        settings = self._settings()
        for name, value in state["settings"].items():
            if settings.get(name) != value:
                raise ValueError(f"state: expected {name} = {settings.get(name)} as here, got {value}")
        self.resume_at(int(state["epoch"]), int(state["position"]))


def _check_at_least(argument: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{argument}: expected an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{argument}: expected at least {least}, got {value}")


class BagLoader(DataLoader[BagBatch]):
    """torch's DataLoader, moving its sampler to the batch last handed out.

    Workers and pinning ask the sampler for batches ahead of time, so that its own count would run ahead.
    """

    batch_sampler: InstanceBudgetSampler

    def __iter__(self) -> Iterator[BagBatch]:  # type: ignore[override]
        sampler = self.batch_sampler
        epoch, position = sampler.start()
        sampler.resume_at(epoch, position)
        for batch in super().__iter__():
            position += 1
            sampler.move_to(epoch, position)
            yield batch
        sampler.move_to(epoch + 1, 0)


def make_loader(
    dataset: BagDataset,
    sampler: InstanceBudgetSampler,
    workers: int = 0,
    pin: bool | None = None,
) -> BagLoader:
    """A loader of packed batches.

    Args:
        dataset: the bags.
        sampler: made from `dataset.sizes`.
        workers: processes that read ahead; 0 reads in this one.
        pin: hand out batches in page-locked memory; None does where there is an accelerator.

    Raises:
        ValueError: the sampler was made for another number of bags.
    """
    if len(sampler.sizes) != len(dataset):
        raise ValueError(
            f"sampler: expected one for the {len(dataset)} bags of {dataset.name!r}, got {len(sampler.sizes)}"
        )
    _check_at_least("workers", workers, 0)
    return BagLoader(
        dataset,  # type: ignore[arg-type]  # torch has one type parameter for what goes in and what comes out
        batch_sampler=sampler,
        collate_fn=dataset.collate,
        num_workers=workers,
        pin_memory=torch.accelerator.is_available() if pin is None else pin,
        persistent_workers=workers > 0,
        # Its own, so that reading data leaves the process's random state alone and a resumed run stays exact.
        generator=torch.Generator().manual_seed(sampler.seed),
    )
