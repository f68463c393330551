"""Flat storage for per-task gradients: one row per task, one view per parameter."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: What takes float64, the others float32.
_WIDE = (torch.float64, torch.complex128)


def accumulation_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """float64 where a parameter is float64 or complex128, float32 for everything else (half precisions included)."""
    return torch.float64 if any(p.dtype in _WIDE for p in parameters) else torch.float32


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The strides that `.grad` of a leaf has: its own where it fills its memory, else those of its shape."""
    size, shape, strides = 1, tensor.shape, tensor.stride()
    for dim in sorted(range(tensor.dim()), key=lambda dim: strides[dim]):
        if shape[dim] == 1:
            continue
        if strides[dim] != size:
            return tuple(torch.empty(shape, device="meta").stride())
        size *= shape[dim]
    return strides


class FlatLayout:
    """Where each parameter lies in a row of P numbers, real and imaginary part of a complex one beside each other.

    A buffer [T, P] (or [P]) is allocated once; gradients are written through views of it in the parameters' shapes and
    memory order, so nothing is ever concatenated.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.device = parameters[0].device
        self.dtype = accumulation_dtype(parameters)
        self._complex = [p.is_complex() for p in parameters]
        self._shapes = [p.shape for p in parameters]
        self._strides = [memory_order(p) for p in parameters]
        self._starts: list[int] = []
        end = 0
        even = 1 + any(self._complex)
        for p in parameters:
            # The parts of a complex number lie on an even place.
            end += end % 2 if p.is_complex() else 0
            self._starts.append(end)
            end += p.numel() * (1 + p.is_complex())
        self.numel = -(-end // even) * even
        self._permuted = [
            strides != tuple(torch.empty(shape, device="meta").stride()) and shape.numel() > 0
            for shape, strides in zip(self._shapes, self._strides, strict=True)
        ]

    def zeros(self, *rows: int) -> Tensor:
        """A zero buffer [*rows, P]."""
        return torch.zeros(*rows, self.numel, dtype=self.dtype, device=self.device)

    def views(self, row: Tensor) -> list[Tensor]:
        """The pieces of a row [P], in the parameters' shapes; [..., 2] of a complex one."""
        result = []
        first = row.storage_offset()
        kinds = zip(self._shapes, self._strides, self._starts, self._complex, strict=True)
        for shape, strides, start, is_complex in kinds:
            if is_complex:
                shape, strides = torch.Size((*shape, 2)), (*(2 * stride for stride in strides), 1)
            result.append(row.as_strided(shape, strides, first + start))
        return result

    def gradients(self, row: Tensor) -> list[Tensor]:
        """The same, complex where the parameter is."""
        views = self.views(row)
        return [torch.view_as_complex(v) if c else v for v, c in zip(views, self._complex, strict=True)]

    def by_shape(self, rows: Tensor) -> Tensor:
        """Rows [count, P] with every parameter in the order of its shape, whatever its memory order: what is saved."""
        return self._reordered(rows, to_memory=False)

    def by_memory(self, rows: Tensor) -> Tensor:
        """The inverse of `by_shape`."""
        return self._reordered(rows, to_memory=True)

    def _reordered(self, rows: Tensor, *, to_memory: bool) -> Tensor:
        if not any(self._permuted):
            return rows
        result = rows.clone()
        for source, target in zip(rows, result, strict=True):
            for number, permuted in enumerate(self._permuted):
                if permuted:
                    pair = source, target
                    laid, flat = pair[::-1] if to_memory else pair
                    view = self.views(laid)[number]
                    flat = flat[self._starts[number] :][: view.numel()].view(view.shape)
                    view.copy_(flat) if to_memory else flat.copy_(view)
        return result


def write_row(views: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Copies one task's gradients into its row; a parameter without a gradient counts as zeros."""
    filled = [(view, as_numbers(grad)) for view, grad in zip(views, gradients, strict=True) if grad is not None]
    empty = [view for view, grad in zip(views, gradients, strict=True) if grad is None]
    if filled:
        torch._foreach_copy_([view for view, _ in filled], [grad for _, grad in filled])
    if empty:
        torch._foreach_zero_(empty)


def finite(values: Tensor) -> Tensor:
    """`values.isfinite()`, in fewer operations."""
    return values.abs() < math.inf


def in_use(buffer: Tensor) -> bool:
    """Whether another tensor has the memory of `buffer`."""
    return _references(buffer) > _references(torch.empty(0))


def _references(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def as_numbers(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor of real numbers, [..., 2] of a complex one; as a rule the gradient itself."""
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
