"""Per-task gradient statistics and their combination (docs/model.md, section 4), in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from umda_fast.reference._numerics import without_autocast

#: Columns of the gradient matrix taken at a time.
CHUNK = 1 << 20


@torch.no_grad()
@without_autocast
def task_gradient_statistics(
    grads: Sequence[Tensor], ema: Tensor, correction: Tensor, active: Tensor | None, beta: float
) -> Tensor:
    """Smooth the gradients of every task in place and return the Gram matrix of what they became.

    ::

        ema[t] <- beta ema[t] + (1 - beta) g[t]   for active tasks t
        gram[s,t] = (correction[s] ema[s]) . (correction[t] ema[t])

    Args:
        grads: one [T, P] tensor, or T * K tensors, those of task 0 first; flattened, a task's K make up P
        columns. ema: float32 [T, P] (or float64), updated in place. correction: [T], the bias correction of
        each task, 1 / (1 - beta^steps). active: bool [T], or None for all; the others keep their row,
        whatever their gradient holds. beta: how much of the old value is kept, 0 <= beta < 1.

    Returns:
        gram [T, T] in ema's dtype, the products summed in float64. Not differentiable.
    """
    tasks = ema.shape[0]
    gram = ema.new_zeros(tasks, tasks, dtype=torch.float64)
    kinds = len(grads) // tasks if len(grads) > 1 else 1  # K tensors per task
    start = 0
    for kind in range(kinds):
        piece = [x.reshape(-1) for x in (grads[0] if len(grads) == 1 else grads[kind::kinds])]
        for first in range(0, piece[0].numel(), CHUNK):
            gradient = torch.stack([x[first : first + CHUNK] for x in piece]).to(ema.dtype)  # [T, chunk]
            rows = ema[:, start : start + gradient.shape[1]]
            smoothed = beta * rows + (1 - beta) * gradient
            rows.copy_(smoothed if active is None else torch.where(active[:, None], smoothed, rows))
            exact = rows.double()
            gram += exact @ exact.T
            start += gradient.shape[1]
    scale = correction.double()
    return (gram * scale[:, None] * scale[None, :]).to(ema.dtype)


@torch.no_grad()
def linear_weight_gradient(d_out: Tensor, x: Tensor, out: Tensor) -> None:
    """``out[o, i] = sum_b d_out[b, o] x[b, i]``, written in place.

    Args:
        d_out: [B, O], the gradient of a loss on what a linear layer returned.
        x: [B, I], what the layer was given.
        out: [O, I].
    """
    torch.mm(d_out.T, x, out=out)


@torch.no_grad()
def combine_task_gradients(ema: Tensor, weights: Tensor, out: Tensor) -> None:
    """``out[p] = sum_t weights[t] ema[t, p]``, added in task order, written in place.

    Args:
        ema: [T, P].
        weights: [T].
        out: [P], any floating dtype; the sum is made in ema's.
    """
    total = torch.zeros_like(ema[0])
    for row, weight in zip(ema, weights.to(ema.dtype), strict=True):
        total += weight * row
    out.copy_(total)
