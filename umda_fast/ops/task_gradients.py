"""Per-task gradient statistics and their combination (docs/model.md, section 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.reference import task_gradients as reference


def task_gradient_statistics(
    grads: Tensor | Sequence[Sequence[Tensor]],
    ema: Tensor,
    *,
    beta: float,
    step: int | Tensor,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Smooth the gradients of every task in place and return the Gram matrix of the smoothed ones, in one pass.

    ``ema[t] <- beta ema[t] + (1 - beta) g[t]``, then ``gram[s,t] = mhat[s] . mhat[t]`` with the bias-corrected
    ``mhat[t] = ema[t] / (1 - beta^step[t])`` (Kingma and Ba 2015).

    Args:
        grads: [T, P], or for each of T tasks a sequence of tensors whose flattened pieces make up P columns, read
            where they lie.
        ema: float32 [T, P] (float64 on the reference), contiguous, updated in place.
        beta: how much of the old average is kept, 0 <= beta < 1.
        step: how often each row has been updated, this update included: an int, or int64 [T] on ema's device
            (never read back to the host).
        active: bool [T], or None for all: rows that are not active are kept as they are, whatever their gradient.
        backend: see `umda_fast.set_backend`.

    Returns:
        gram [T, T] in ema's dtype, accurate to 1e-6 relative at P = 10^8. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    tasks, size = _check_averages(ema)
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    if isinstance(grads, Tensor):
        _validate.tensor(grads, "grads", [tasks, size], dtype=_validate.FLOATS, like=ema, like_name="ema")
        pieces = [grads]
    else:
        pieces = _flat_pieces(grads, ema)
    if active is not None:
        _validate.tensor(active, "active", [tasks], dtype=torch.bool, like=ema, like_name="ema")
    if isinstance(step, Tensor):
        _validate.tensor(step, "step", [tasks], dtype=torch.int64, like=ema, like_name="ema")
        correction = (1 - beta ** step.to(torch.float64)).reciprocal().to(ema.dtype)
    else:
        _validate.in_range(step, "step", 1)
        correction = ema.new_full((tasks,), 1 / (1 - beta**step))
    chosen = resolve("task_gradient_statistics", ema, backend)
    if chosen == "reference":
        return reference.task_gradient_statistics(pieces, ema, correction, active, beta)
    gram: Tensor = _library.op(native("task_gradient_statistics", chosen))(
        pieces, ema, correction, active, beta
    )
    return gram


def combine_task_gradients(
    ema: Tensor, weights: Tensor, out: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``out[p] = sum_t weights[t] ema[t, p]`` in one pass.

    Args:
        ema: float32 [T, P] (float64 on the reference), contiguous.
        weights: [T], ema's dtype; include the bias correction ``1 / (1 - beta^step)`` where it is wanted.
        out: [P], written in place; None allocates it.
        backend: see `umda_fast.set_backend`.

    Returns:
        ``out`` [P]. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    tasks, size = _check_averages(ema)
    _validate.tensor(weights, "weights", [tasks], like=ema, like_name="ema")
    if out is None:
        out = ema.new_empty(size)
    _validate.tensor(out, "out", [size], dtype=_validate.FLOATS, like=ema, like_name="ema")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
    chosen = resolve("combine_task_gradients", ema, backend)
    if chosen == "reference":
        reference.combine_task_gradients(ema, weights, out)
    else:
        _library.op(native("combine_task_gradients", chosen))(ema, weights, out)
    return out


def linear_weight_gradient(d_out: Tensor, x: Tensor, out: Tensor, *, backend: str | None = None) -> Tensor:
    """The gradient of a linear layer's weight, written where it is wanted: ``out[o, i] = sum_b d_out[b, o] x[b, i]``.

    Args:
        d_out: [B, O], the gradient on the layer's output, float32 (float64 on the reference).
        x: [B, I], the layer's input, d_out's dtype.
        out: [O, I], contiguous in its last dimension, d_out's dtype, overwritten; must not overlap the others.
        backend: see `umda_fast.set_backend`. On CUDA the reference, a matrix product of cuBLAS, serves it.

    Returns:
        ``out`` [O, I]. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _validate.tensor(d_out, "d_out", ["B", "O"], dtype=(torch.float32, torch.float64))
    _validate.tensor(x, "x", [d_out.shape[0], "I"], like=d_out, like_name="d_out")
    _validate.tensor(out, "out", [d_out.shape[1], x.shape[1]], like=d_out, like_name="d_out")
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out must be contiguous in its last dimension, got strides {list(out.stride())}")
    chosen = resolve("linear_weight_gradient", d_out, backend)
    if chosen == "reference":
        reference.linear_weight_gradient(d_out, x, out)
    else:
        _library.op(native("linear_weight_gradient", chosen))(d_out, x, out)
    return out


def _check_averages(ema: Tensor) -> tuple[int, int]:
    """T and P of ``ema``."""
    _validate.tensor(ema, "ema", ["T", "P"], dtype=(torch.float32, torch.float64))
    if not ema.is_contiguous():
        raise ValueError(f"ema must be contiguous, got strides {list(ema.stride())}")
    tasks, size = ema.shape
    return tasks, size


def _flat_pieces(grads: Sequence[Sequence[Tensor]], ema: Tensor) -> list[Tensor]:
    """T * K tensors, those of task 0 first."""
    tasks, size = ema.shape
    if len(grads) != tasks:
        raise ValueError(
            f"grads must hold one sequence for each of the {tasks} rows of ema, got {len(grads)}"
        )
    pieces = []
    for t, task in enumerate(grads):
        if len(task) != len(grads[0]):
            raise ValueError(
                f"grads[{t}] must hold {len(grads[0])} tensors as grads[0] does, got {len(task)}"
            )
        for i, piece in enumerate(task):
            shape = grads[0][i].shape
            _validate.tensor(
                piece, f"grads[{t}][{i}]", shape, dtype=_validate.FLOATS, like=ema, like_name="ema"
            )
            pieces.append(piece)
        total = sum(piece.numel() for piece in task)
        if total != size:
            raise ValueError(f"grads[{t}] must hold P = {size} elements in all, got {total}")
    return pieces


def _fake_statistics(
    grads: list[Tensor], ema: Tensor, correction: Tensor, active: Tensor | None, beta: float
) -> Tensor:
    return ema.new_empty(ema.shape[0], ema.shape[0])


def _fake_combine(ema: Tensor, weights: Tensor, out: Tensor) -> None:
    return None


_library.define(
    "task_gradient_statistics",
    "(Tensor[] grads, Tensor(a!) ema, Tensor correction, Tensor? active, float beta) -> Tensor",
    _fake_statistics,
)
_library.define("linear_weight_gradient", "(Tensor d_out, Tensor x, Tensor(a!) out) -> ()", _fake_combine)
_library.define("combine_task_gradients", "(Tensor ema, Tensor weights, Tensor(a!) out) -> ()", _fake_combine)
