"""The one place where self-guided learning meets the operation `task_gradients`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from umda_fast.ops import combine_task_gradients, task_gradient_statistics

#: Columns in one call of `gram`: the scratch memory is T times this.
CHUNK = 1 << 20


def bias_correction(counts: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """`1 / (1 - beta^k)` for k updates of each entry; 1 for an entry never updated, which is zero."""
    kept = torch.pow(beta, counts.double())  # below 1, but for no update
    return (1 - kept).reciprocal().nan_to_num(posinf=1.0).to(dtype)


def smooth(
    gradients: Sequence[Tensor],
    ema: Tensor,
    counts: Tensor,
    active: Tensor | None,
    beta: float,
    backend: str | None,
) -> Tensor:
    """Updates `ema` [T, P] in place and returns the Gram matrix [T, T] of its bias-corrected rows.

    `gradients` is one tensor [T, P], or T * K tensors, those of task 0 first. A row never updated is zero and
    stays so, whatever its correction.
    """
    kinds = len(gradients) // len(ema)
    nested = [gradients[t * kinds : (t + 1) * kinds] for t in range(len(ema))]
    return task_gradient_statistics(
        gradients[0] if len(gradients) == 1 else nested,
        ema,
        beta=beta,
        step=counts.clamp_min(1),
        active=active,
        backend=backend,
    )


def gram(gradients: Sequence[Tensor], dtype: torch.dtype, backend: str | None) -> Tensor:
    """Gram matrix [T, T] of T gradients of any one shape, a million columns at a time."""
    count, columns = len(gradients), gradients[0].numel()
    device = gradients[0].device
    # With beta 0 the average is the gradient, and the operation sums the products in float64, which a matmul
    # in float32 (or, on CUDA, TF32) would not.
    scratch = torch.zeros(count * min(columns, CHUNK), device=device, dtype=dtype)
    once = torch.ones(count, dtype=torch.int64, device=device)
    total = torch.zeros(count, count, dtype=torch.float64, device=device)
    flat = [gradient.reshape(-1) for gradient in gradients]
    for start in range(0, columns, CHUNK):
        pieces = [row[start : start + CHUNK] for row in flat]
        ema = scratch[: count * pieces[0].numel()].view(count, -1)
        total += smooth([pieces[0][None]] if count == 1 else pieces, ema, once, None, 0.0, backend)
    return total.to(dtype)


def combine(ema: Tensor, weights: Tensor, out: Tensor, backend: str | None) -> None:
    """`out = sum_t weights_t ema_t` in one pass."""
    combine_task_gradients(ema, weights, out, backend=backend)
