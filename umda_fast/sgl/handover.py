"""Gradients handed to autograd, which adds them to `.grad`: hooks, layout and accumulation are its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: A leaf and a gradient of it.
Gradient = tuple[Tensor, Tensor]


class _HandOver(torch.autograd.Function):
    """A node whose backward pass gives its inputs, leaves, gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        """A zero to start a backward pass from."""
        ctx.gradients = gradients
        return torch.zeros((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients. Nothing else refers to them then, so that a missing `.grad` takes their memory."""
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return (None, *gradients)


def hand_over(gradients: list[Gradient]) -> None:
    """Adds each gradient to the `.grad` of its leaf, as the end of a backward pass does; empties the list."""
    if not gradients:
        return
    leaves = [leaf for leaf, _ in gradients]
    found = [gradient for _, gradient in gradients]
    gradients.clear()
    with torch.enable_grad():
        start: Tensor = _HandOver.apply(found, *leaves)  # type: ignore[no-untyped-call]
    torch.autograd.backward(start)


@contextmanager
def hooks_held(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Lets passes that only look at gradients not call the hooks of leaves, which see the gradient in the end."""
    hooks: list[dict[int, Any]] = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    held = [dict(of_leaf) for of_leaf in hooks]
    for of_leaf in hooks:
        of_leaf.clear()
    try:
        yield
    finally:
        for of_leaf, saved in zip(hooks, held, strict=True):
            of_leaf.update(saved)


def weighted_sums(found: Sequence[tuple[Tensor, int, Tensor]], weights: Tensor) -> list[Gradient]:
    """For each leaf the sum of its gradients, those of the task at position t times `weights[t]`, -1 as they are.

    Args:
        found: (leaf, position, gradient), dense or sparse.
        weights: [A].
    """
    sums: dict[int, Gradient] = {}
    for position in sorted({position for _, position, _ in found}):
        of = [(leaf, gradient) for leaf, at, gradient in found if at == position]
        scaled = [gradient for _, gradient in of]
        if position >= 0:
            dense = [gradient for gradient in scaled if gradient.layout == torch.strided]
            products = iter(torch._foreach_mul(dense, weights[position]) if dense else ())
            scaled = [next(products) if g.layout == torch.strided else g * weights[position] for g in scaled]
        for (leaf, _), gradient in zip(of, scaled, strict=True):
            old = sums.get(id(leaf))
            if old is not None:
                # A sparse sum takes no dense summand, but the other way round.
                gradient = gradient + old[1] if gradient.layout == torch.strided else old[1] + gradient
            sums[id(leaf)] = leaf, gradient
    return list(sums.values())
