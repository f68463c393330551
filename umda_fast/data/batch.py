"""Bags packed one behind the other, never padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umda_fast.data.bag import Bag, label_tensor
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec, ViewSpec
from umda_fast.ops import check_batch, share_checks


@dataclass
class BagBatch:
    """Bags packed one behind the other, N instances in all.

    Attributes:
        views: view name -> [N, d_v]; rows of missing views are zeros.
        mask: bool [N, V], columns in the order of `views`.
        ptr: int64 [B+1]; bag b owns rows ptr[b]:ptr[b+1].
        labels: task name -> binary float32 [B], multiclass and ordinal int64 [B], multilabel float32 [B, C], regression
            float32 [B] in original units, survival float32 [B, 2]; zero where missing.
        label_mask: task name -> bool [B], whether the label is there.
        names: the bags' names.
        coords: [N, 2], or None.
        metadata: float32 [B, M], NaN where missing, or None.
        frames: int64 [S+1], offsets of the slides of which bags are made, S at least the number of bags that have
            instances; None where every bag is one slide.
        complete: whether it is known that no view is missing, as `collate` finds out: a mask that is True everywhere
            costs passes over the features and changes nothing.
    """

    views: dict[str, Tensor]
    mask: Tensor
    ptr: Tensor
    labels: dict[str, Tensor]
    label_mask: dict[str, Tensor]
    names: list[str]
    coords: Tensor | None = None
    metadata: Tensor | None = None
    frames: Tensor | None = None
    complete: bool = field(default=False, init=False)  # so that a copy with another mask does not keep it

    def __len__(self) -> int:
        """The number of bags."""
        return len(self.names)

    @property
    def num_instances(self) -> int:
        return self.mask.shape[0]

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's forward; `mask` is None where the batch is `complete`."""
        mask = None if self.complete else self.mask
        inputs = {"views": self.views, "ptr": self.ptr, "mask": mask, "coords": self.coords}
        more = {"metadata": self.metadata, "frames": self.frames}
        return {**inputs, **{name: value for name, value in more.items() if value is not None}}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BagBatch:
        """The batch on another device; tensors already there are shared."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> BagBatch:
        """The batch in page-locked memory. Needs an accelerator, like `torch.Tensor.pin_memory`."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> BagBatch:
        if self.ptr.device.type == "cpu":
            check_batch(self.ptr, self.mask)  # here, where it costs no synchronisation
        moved = BagBatch(
            views={name: move(features) for name, features in self.views.items()},
            mask=share_checks(self.mask, move(self.mask)),
            ptr=share_checks(self.ptr, move(self.ptr)),
            labels={name: move(label) for name, label in self.labels.items()},
            label_mask={name: move(present) for name, present in self.label_mask.items()},
            names=self.names,
            coords=None if self.coords is None else move(self.coords),
            metadata=None if self.metadata is None else move(self.metadata),
            frames=None if self.frames is None else share_checks(self.frames, move(self.frames)),
        )
        moved.complete = self.complete
        return moved


def collate(bags: Sequence[Bag], views: Sequence[ViewSpec], tasks: Sequence[TaskSpec]) -> BagBatch:
    """Pack bags into one batch, in the order given. A batch of one bag shares the bag's features.

    Raises:
        DataError: a bag does not fit the specs; dtypes of a view differ between bags; only some bags have
            coords.
    """
    for bag in bags:
        bag.check(views, tasks)
    return pack(bags, views, tasks)


def pack(bags: Sequence[Bag], views: Sequence[ViewSpec], tasks: Sequence[TaskSpec]) -> BagBatch:
    """`collate` for bags that were checked when they were loaded."""
    sizes = torch.tensor([0, *(len(bag) for bag in bags)], dtype=torch.int64)
    mask = torch.cat([torch.zeros(0, len(views), dtype=torch.bool), *(_mask(bag, views) for bag in bags)])
    ptr = sizes.cumsum(0)
    check_batch(ptr, mask)
    slides = [bag.slides for bag in bags]
    labels, label_mask = _collate_labels(bags, tasks)
    batch = BagBatch(
        views={view.name: _collate_view(bags, view, mask[:, column]) for column, view in enumerate(views)},
        mask=mask,
        ptr=ptr,
        labels=labels,
        label_mask=label_mask,
        names=[bag.name for bag in bags],
        coords=_collate_coords(bags),
        metadata=_collate_metadata(bags),
        frames=frames_of(slides, ptr, mask) if any(slide is not None for slide in slides) else None,
    )
    batch.complete = bool(mask.all())
    return batch


def frames_of(slides: Sequence[Tensor | None], ptr: Tensor, mask: Tensor) -> Tensor:
    """`BagBatch.frames` of bags whose `Bag.slides` are given, at `ptr`."""
    starts = [torch.zeros(1, dtype=torch.int64)]
    for first, last, slide in zip(ptr[:-1].tolist(), ptr[1:].tolist(), slides, strict=True):
        if slide is not None:
            starts.append(first + 1 + slide.diff().nonzero()[:, 0])
        starts.append(torch.tensor([last]))
    frames = torch.cat(starts)
    check_batch(frames, mask)
    return frames


def _mask(bag: Bag, views: Sequence[ViewSpec]) -> Tensor:
    if bag.mask is not None:
        return bag.mask
    return torch.tensor([[view.name in bag.views for view in views]]).expand(len(bag), -1)


def _collate_view(bags: Sequence[Bag], view: ViewSpec, present: Tensor) -> Tensor:
    given = [bag for bag in bags if view.name in bag.views]
    if not given:
        other = next(iter(bags[0].views.values())) if bags else torch.empty(0)
        return other.new_zeros(present.shape[0], view.width)
    first = given[0].views[view.name]
    for bag in given:
        if bag.views[view.name].dtype != first.dtype:
            raise DataError(
                f"bag {bag.name!r}: view {view.name!r}: expected dtype {first.dtype} as in bag "
                f"{given[0].name!r}, got {bag.views[view.name].dtype}"
            )
    parts = [
        bag.views[view.name] if view.name in bag.views else first.new_zeros(len(bag), view.width)
        for bag in bags
    ]
    # A bag too large to copy without need is a batch of its own.
    packed = torch.cat(parts) if len(parts) > 1 else parts[0]
    # Not a product with the mask: missing rows may hold NaN.
    return packed if bool(present.all()) else packed.masked_fill(~present[:, None], 0.0)


def _collate_labels(
    bags: Sequence[Bag], tasks: Sequence[TaskSpec]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    labels, label_mask = {}, {}
    for task in tasks:
        column = label_tensor(task, np.zeros((len(bags), *task.label_shape)))
        present = torch.zeros(len(bags), dtype=torch.bool)
        for row, bag in enumerate(bags):
            if task.name in bag.labels:
                column[row] = bag.labels[task.name]
                present[row] = True
        labels[task.name], label_mask[task.name] = column, present
    return labels, label_mask


def _collate_coords(bags: Sequence[Bag]) -> Tensor | None:
    without = [bag.name for bag in bags if bag.coords is None]
    if len(without) == len(bags):
        return None
    if without:
        raise DataError(f"bag {without[0]!r}: coords: expected [n, 2] as other bags have, got none")
    return torch.cat([bag.coords for bag in bags if bag.coords is not None])


def _collate_metadata(bags: Sequence[Bag]) -> Tensor | None:
    given = [bag.metadata for bag in bags if bag.metadata is not None]
    if given and (len(given) < len(bags) or len({len(values) for values in given}) > 1):
        raise DataError(f"bag {bags[0].name!r}: metadata: expected as many numbers in every bag of a batch")
    return torch.stack(given) if given else None
