"""gelu_dropout on the CPU against PyTorch's own three passes: ``python -m bench.bench_gelu_dropout``.

Floor: forward reads x and writes y, 2 elements; backward reads x and d_y and writes dx, 3. Separate passes are a sum
with the bias, GELU, dropout with a mask that is drawn and stored, and what autograd makes of them. `without dropout`
shows what the random numbers cost either.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.ops import gelu_dropout
from umda_fast.reference.gelu_dropout import gelu_dropout as reference
from umda_fast.reference.philox import dropout

from .harness import arguments, medians, report, require_parity, traffic_note

RATE = 0.1
Function = Callable[[Tensor, Tensor], Tensor]


def ours(x: Tensor, bias: Tensor) -> Tensor:
    return gelu_dropout(x, bias, p=RATE, backend="cpp")


def separate(x: Tensor, bias: Tensor) -> Tensor:
    return F.dropout(F.gelu(x + bias.to(x.dtype)), RATE)


CONTENDERS: dict[str, Function] = {
    "umda_fast": ours,
    "separate passes": separate,
    "umda_fast, without dropout": lambda x, bias: gelu_dropout(x, bias, backend="cpp"),
    "separate passes, without dropout": lambda x, bias: F.gelu(x + bias.to(x.dtype)),
}


def make_inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves, and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    x, d_y = (torch.randn(rows, width, generator=generator).to(dtype) for _ in "xy")
    return x.requires_grad_(), torch.randn(width, generator=generator).requires_grad_(), d_y


def check(width: int, dtype: torch.dtype) -> None:
    x, bias, d_y = make_inputs(3000, width, dtype)
    seed, threshold = torch.tensor(11), round(65536 * RATE)

    def results(function: Function, to: torch.dtype | None) -> list[Tensor]:
        leaves = [t.detach().to(to or t.dtype).requires_grad_() for t in (x, bias)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, d_y.to(y.dtype))]

    exact = results(lambda x, bias: reference(x, bias, seed, threshold), torch.float64)
    own = results(lambda x, bias: dropout(F.gelu(x + bias.to(x.dtype)), seed, threshold), None)
    found = results(lambda x, bias: gelu_dropout(x, bias, p=RATE, seed=seed, backend="cpp"), None)
    require_parity(f"gelu_dropout, D = {width}, {dtype}", found, exact, own)


def compare(rows: int, width: int, dtype: torch.dtype, repeats: int, copy: float) -> None:
    x, bias, d_y = make_inputs(rows, width, dtype)
    title = f"{rows:,} x {width}, {dtype}, p = {RATE}"
    with torch.no_grad():
        forward = medians({name: lambda f=f: f(x, bias) for name, f in CONTENDERS.items()}, repeats)
    notes = {name: traffic_note(2 * x.nbytes, seconds, copy) for name, seconds in forward.items()}
    report(f"forward, {title}", forward, notes)
    both = medians(
        {name: lambda f=f: torch.autograd.grad(f(x, bias), (x, bias), d_y) for name, f in CONTENDERS.items()}, repeats
    )
    notes = {name: traffic_note(5 * x.nbytes, seconds, copy) for name, seconds in both.items()}
    report(f"forward + backward, {title}", both, notes)


def main() -> None:
    options = arguments(__doc__ or "")
    for width, dtype in [(512, torch.float32), (256, torch.float32), (512, torch.bfloat16)]:
        check(width, dtype)
        compare(int(60_000 * options.size), width, dtype, options.repeats, options.copy)


if __name__ == "__main__":
    main()
