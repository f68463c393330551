"""task_gradients on the CPU against eager PyTorch: ``python -m bench.bench_task_gradients``.

Floor: the statistics read the gradients and the running mean and write it (3*T*P elements), the combination
reads it and writes one row (T*P + P).
"""

import torch
from torch import Tensor

import umda_fast.ops  # noqa: F401  (defines the operations)
from bench.harness import arguments, copy_rate, medians, report

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


def ours(grads: list[Tensor], ema: Tensor, correction: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    gram: Tensor = torch.ops.umda_fast.task_gradient_statistics(grads, ema, correction, None, BETA)
    torch.ops.umda_fast.combine_task_gradients(ema, weights * correction, out)
    return gram


def compare(tasks: int, columns: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(tasks, columns, generator=generator)
    ema, other = torch.zeros(tasks, columns), torch.zeros(tasks, columns)
    correction, weights, out = torch.full((tasks,), 1.5), torch.ones(tasks), torch.empty(columns)
    pieces = [piece for row in grads for piece in row.view(20, columns // 20).unbind(0)]
    rate = copy_rate()
    seconds = medians(
        {
            "umda_fast": lambda: ours([grads], ema, correction, weights, out),
            "umda_fast, 20 tensors per task": lambda: ours(pieces, ema, correction, weights, out),
            "eager": lambda: eager(grads, other, correction, weights, out),
            "eager, 20 tensors per task": lambda: eager_list(pieces, other, correction, weights, out),
        },
        repeats,
    )
    floor = (4 * tasks + 1) * columns * 4 / rate
    notes = {name: f"{floor / s:5.0%} of the copy rate" for name, s in seconds.items()}
    report(f"T = {tasks}, P = {columns:,}", seconds, notes)


def main() -> None:
    options = arguments(__doc__ or "")
    for tasks, columns in [(8, 1_840_000), (3, 1_840_000), (16, 1_000_000)]:
        compare(tasks, int(columns * options.size) // 1000 * 1000, options.repeats)


if __name__ == "__main__":
    main()
