"""Slides that make one bag together: all slides of a patient, each with coordinates of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.bag import Bag, bag_labels
from umda_fast.data.metadata import Positions
from umda_fast.data.stores import BagStore
from umda_fast.model.specs import TaskSpec, ViewSpec

__all__ = ["JoinedSlides", "JoinedStore", "join_slides"]


@dataclass(frozen=True)
class JoinedSlides:
    """The slides of B bags.

    Attributes:
        store: has the slides as bags of their own, without labels.
        views: of them.
        members: for every bag the rows of its slides in `store`, in the order in which their instances stand.
    """

    store: BagStore
    views: tuple[ViewSpec, ...]
    members: tuple[IntArray, ...]

    def take(self, rows: IntArray) -> JoinedSlides:
        """Those of the bags at `rows`."""
        return JoinedSlides(self.store, self.views, tuple(self.members[row] for row in rows.tolist()))

    def names(self, bag: int) -> list[str]:
        """Of the slides of one bag."""
        return [self.store.names[row] for row in self.members[bag].tolist()]

    def sizes(self, bag: int) -> IntArray:
        """Instances of the slides of one bag, int64."""
        return self.store.sizes[self.members[bag]]


class JoinedStore:
    """Bags of several slides each, see `umda_fast.data.stores.BagStore`; a slide is read when its bag is.

    Args:
        slides: which make up which bag, every bag of at least one.
        names: of the bags.
        tasks, labels: as of a store.
        skipped: grows as long as the source is being opened.
    """

    def __init__(
        self,
        slides: JoinedSlides,
        names: Sequence[str],
        tasks: Sequence[TaskSpec],
        labels: Mapping[str, FloatArray],
        skipped: list[str],
    ) -> None:
        self.slides = slides
        self.names = names
        self.sizes: IntArray = np.array([slides.sizes(bag).sum() for bag in range(len(names))], dtype=np.int64)
        self.labels = labels
        self.skipped = skipped
        self.positions = _positions(slides)
        self._tasks = tuple(tasks)

    def load(self, index: int) -> Bag:
        bags = [self.slides.store.load(row) for row in self.slides.members[index].tolist()]
        labels = bag_labels(self._tasks, self.labels, index)
        return join_slides(self.names[index], bags, self.slides.views, labels)


def _positions(slides: JoinedSlides) -> Positions | None:
    """Of the bags: sizes that all slides of one agree in, else NaN."""
    known: Positions | None = getattr(slides.store, "positions", None)
    if known is None:
        return None

    def common(values: FloatArray) -> FloatArray:
        each = [np.unique(values[rows]) for rows in slides.members]  # of NaN one
        return np.array([found[0] if len(found) == 1 else np.nan for found in each])

    return Positions(known.unit, common(known.patch_size), common(known.pixel_size))


def join_slides(name: str, slides: Sequence[Bag], views: Sequence[ViewSpec], labels: dict[str, Tensor]) -> Bag:
    """One bag of the instances of all `slides`, slide after slide.

    Args:
        slides: at least one; of one dataset, with coordinates all or none.
        views: of that dataset.
    """
    masks = [
        torch.tensor([view.name in slide.views for view in views]).expand(len(slide), -1)
        if slide.mask is None
        else slide.mask
        for slide in slides
    ]
    mask = torch.cat(masks)
    joined = {}
    for view in views:
        there = [slide.views[view.name] for slide in slides if view.name in slide.views]
        if there:
            joined[view.name] = torch.cat(
                [
                    slide.views[view.name] if view.name in slide.views else there[0].new_zeros(len(slide), view.width)
                    for slide in slides
                ]
            )
    coords = [slide.coords for slide in slides if slide.coords is not None]
    # What of a slide has a frame of its own keeps it.
    numbers, start = [], 0
    for slide in slides:
        own = torch.zeros(len(slide), dtype=torch.int64) if slide.slides is None else slide.slides
        numbers.append(start + own)
        start += 1 + (int(own.max()) if len(own) else 0)
    return Bag(
        name,
        joined,
        None if bool(mask.all()) else mask,
        labels,
        torch.cat(coords) if len(coords) == len(slides) else None,
        slides=torch.cat(numbers),
    )
