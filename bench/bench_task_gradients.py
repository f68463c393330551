"""task_gradients on the CPU against eager PyTorch: ``python -m bench.bench_task_gradients``.

Floor: the statistics read the gradients and the running mean and write it (3*T*P elements), the combination
reads it and writes one row (T*P + P).
"""

import torch
from torch import Tensor

from umda_fast.ops import combine_task_gradients, task_gradient_statistics

from .harness import arguments, medians, report, require_parity, traffic_note

BETA = 0.9


def eager(grads: Tensor, ema: Tensor, correction: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Smoothing in place, the corrected mean, its Gram matrix, its weighted sum."""
    ema.mul_(BETA).add_(grads, alpha=1 - BETA)
    corrected = ema * correction[:, None]
    gram = corrected @ corrected.T
    torch.mv(corrected.T, weights, out=out)
    return gram


def eager_list(grads: list[Tensor], ema: Tensor, correction: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """From the parameters' gradients: they have to be concatenated first."""
    tasks = ema.shape[0]
    kinds = len(grads) // tasks
    rows = [torch.cat([g.flatten() for g in grads[t * kinds : (t + 1) * kinds]]) for t in range(tasks)]
    return eager(torch.stack(rows), ema, correction, weights, out)


def ours(
    grads: Tensor | list[list[Tensor]], ema: Tensor, step: int, correction: Tensor, weights: Tensor, out: Tensor
) -> Tensor:
    gram = task_gradient_statistics(grads, ema, beta=BETA, step=step, backend="cpp")
    combine_task_gradients(ema, weights * correction, out, backend="cpp")
    return gram


def check() -> None:
    generator = torch.Generator().manual_seed(0)
    grads, start = (torch.randn(8, 50_000, generator=generator) for _ in range(2))
    correction, weights = torch.full((8,), 1 / (1 - BETA**3)), torch.rand(8, generator=generator)

    def results(dtype: torch.dtype) -> list[Tensor]:
        ema, out = start.to(dtype), torch.empty(50_000, dtype=dtype)
        return [eager(grads.to(dtype), ema, correction.to(dtype), weights.to(dtype), out), ema, out]

    ema, out = start.clone(), torch.empty(50_000)
    found = [ours(grads, ema, 3, correction, weights, out), ema, out]
    require_parity("task_gradients", found, results(torch.float64), results(torch.float32))


def compare(tasks: int, columns: int, repeats: int, copy: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(tasks, columns, generator=generator)
    ema, other = torch.zeros(tasks, columns), torch.zeros(tasks, columns)
    correction, weights = torch.full((tasks,), 1 / (1 - BETA**3)), torch.ones(tasks)
    out = torch.empty(columns)
    pieces = [list(row.view(20, columns // 20).unbind(0)) for row in grads]
    flat = [piece for row in pieces for piece in row]
    seconds = medians(
        {
            "umda_fast": lambda: ours(grads, ema, 3, correction, weights, out),
            "umda_fast, 20 tensors per task": lambda: ours(pieces, ema, 3, correction, weights, out),
            "eager": lambda: eager(grads, other, correction, weights, out),
            "eager, 20 tensors per task": lambda: eager_list(flat, other, correction, weights, out),
        },
        repeats,
    )
    moved = (4 * tasks + 1) * columns * 4
    notes = {name: traffic_note(moved, s, copy) for name, s in seconds.items()}
    report(f"T = {tasks}, P = {columns:,}", seconds, notes)


def main() -> None:
    options = arguments(__doc__ or "")
    check()
    for tasks, columns in [(8, 1_840_000), (3, 1_840_000), (16, 1_000_000)]:
        compare(tasks, int(columns * options.size) // 1000 * 1000, options.repeats, options.copy)


if __name__ == "__main__":
    main()
