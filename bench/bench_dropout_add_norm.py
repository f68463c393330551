"""dropout_add_norm on the CPU against PyTorch's own passes: ``python -m bench.bench_dropout_add_norm``.

Floor: forward reads x and the residual stream and writes the sum and its layer norm, 4 elements; backward reads the
gradients of both, the sum and x, and writes two gradients, 6. Separate passes are a sum with the bias, dropout with a
mask that is drawn and stored, a product with the gain, the sum, the layer norm, and what autograd makes of them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.ops import dropout_add_norm
from umda_fast.reference.dropout_add_norm import dropout_add_norm as reference
from umda_fast.reference.philox import dropout

from .harness import arguments, medians, report, require_parity, traffic_note

RATE, EPS = 0.1, 1e-5
Function = Callable[..., Sequence[Tensor | None]]


def composed(drop: Callable[[Tensor], Tensor]) -> Function:
    """Separate passes, with this dropout."""

    def run(x: Tensor, residual: Tensor, bias: Tensor, gain: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
        total = residual + gain.to(x.dtype) * drop(x + bias.to(x.dtype))
        parameters = scale.to(total.dtype), shift.to(total.dtype)
        return [total, F.layer_norm(total, x.shape[-1:], *parameters, EPS).to(x.dtype)]

    return run


CONTENDERS: dict[str, Function] = {
    "umda_fast": lambda *x: dropout_add_norm(*x, p=RATE, eps=EPS, backend="cpp"),
    "separate passes": composed(lambda x: F.dropout(x, RATE)),
    "umda_fast, without dropout": lambda *x: dropout_add_norm(*x, eps=EPS, backend="cpp"),
    "separate passes, without dropout": composed(lambda x: x),
}


def make_inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, and gradients of both results."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(4)]
    vectors = [torch.randn(width, generator=generator) for _ in range(4)]
    return [x.requires_grad_() for x in (*wide[:2], *vectors)], wide[2:]


def check(width: int, dtype: torch.dtype) -> None:
    inputs, gradients = make_inputs(3000, width, dtype)
    seed, threshold = torch.tensor(11), round(65536 * RATE)

    def results(function: Function, to: torch.dtype | None) -> list[Tensor]:
        leaves = [t.detach().to(to or t.dtype).requires_grad_() for t in inputs]
        outputs = [y for y in function(*leaves) if y is not None]
        found = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)])
        return [*(y.detach() for y in outputs), *found]

    def exactly(x: Tensor, residual: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        return reference(x, *vectors[:2], residual, *vectors[2:], seed, threshold, EPS)

    exact = results(exactly, torch.float64)
    own = results(composed(lambda x: dropout(x, seed, threshold)), None)
    found = results(lambda *x: dropout_add_norm(*x, p=RATE, eps=EPS, seed=seed, backend="cpp"), None)
    require_parity(f"dropout_add_norm, D = {width}, {dtype}", found, exact, own)


def compare(rows: int, width: int, dtype: torch.dtype, repeats: int, copy: float) -> None:
    inputs, gradients = make_inputs(rows, width, dtype)
    title = f"{rows:,} x {width}, {dtype}, p = {RATE}"
    with torch.no_grad():
        forward = medians({name: lambda f=f: f(*inputs) for name, f in CONTENDERS.items()}, repeats)
    size = inputs[0].nbytes
    report(f"forward, {title}", forward, {name: traffic_note(4 * size, s, copy) for name, s in forward.items()})
    both = medians(
        {name: lambda f=f: torch.autograd.grad(f(*inputs), inputs, gradients) for name, f in CONTENDERS.items()},
        repeats,
    )
    notes = {name: traffic_note(10 * size, seconds, copy) for name, seconds in both.items()}
    report(f"forward + backward, {title}", both, notes)


def main() -> None:
    options = arguments(__doc__ or "")
    for width, dtype in [(256, torch.float32), (128, torch.float32), (256, torch.bfloat16)]:
        check(width, dtype)
        compare(int(100_000 * options.size), width, dtype, options.repeats, options.copy)


if __name__ == "__main__":
    main()
