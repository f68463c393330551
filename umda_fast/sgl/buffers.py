"""Flat storage for per-task gradients: one row per task, one view per parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def accumulation_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """float64 where a parameter is float64, float32 for everything else (half precisions included)."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


class FlatLayout:
    """Where each parameter lies in a row of P numbers.

    A buffer [T, P] (or [P]) is allocated once; gradients are written through views of it in the
    parameters' shapes, so nothing is ever concatenated.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.numel = sum(self.sizes)
        self.device = parameters[0].device
        self.dtype = accumulation_dtype(parameters)

    def zeros(self, *rows: int) -> Tensor:
        """A zero buffer [*rows, P]."""
        return torch.zeros(*rows, self.numel, dtype=self.dtype, device=self.device)

    def views(self, row: Tensor) -> list[Tensor]:
        """The pieces of a row [P], in the parameters' shapes."""
        return [piece.view(shape) for piece, shape in zip(row.split(self.sizes), self.shapes, strict=True)]


def write_row(views: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Copies one task's gradients into its row; a parameter without a gradient counts as zeros."""
    filled = [(view, grad) for view, grad in zip(views, gradients, strict=True) if grad is not None]
    empty = [view for view, grad in zip(views, gradients, strict=True) if grad is None]
    if filled:
        torch._foreach_copy_([view for view, _ in filled], [grad for _, grad in filled])
    if empty:
        torch._foreach_zero_(empty)


def accumulate(parameters: Sequence[Parameter], gradients: Sequence[Tensor]) -> None:
    """Adds `gradients` to `.grad`, as `Tensor.backward` does: a missing `.grad` becomes the gradient
    itself."""
    present: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.dtype)
        else:
            present.append(parameter.grad)
            added.append(gradient)
    if present:
        torch._foreach_add_(present, added)
