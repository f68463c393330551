"""cross_view on the CPU against what PyTorch composes: ``python -m bench.bench_cross_view``.

Floor: forward reads q, k, v and writes out (4 times N*V*H*Dh elements), backward reads four and writes three.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from umda_fast.ops import cross_view_attention
from umda_fast.reference.cross_view import cross_view as reference

from .harness import arguments, medians, report, require_parity, traffic_note

HEADS, WIDTH = 8, 32

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def eager(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Masked softmax over all views at once; no entropy, no mass."""
    hidden = torch.eye(q.shape[1], dtype=torch.bool)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, :]
    scores = torch.einsum("nuhd,nwhd->nhuw", q, k) / math.sqrt(q.shape[3]) + bias
    a = scores.masked_fill(hidden, -1e30).softmax(-1)
    g = gate.sigmoid()[..., None]
    return g * v + (1 - g) * torch.einsum("nhuw,nwhd->nuhd", a, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The same through PyTorch's fused attention, instances as its batch."""
    hidden = torch.eye(q.shape[1], dtype=torch.bool)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, :]
    logits = bias.masked_fill(hidden, -1e30)
    cross = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), logits)
    g = gate.sigmoid()[..., None]
    return g * v + (1 - g) * cross.transpose(1, 2)


def with_gradients(function: Callable[..., Tensor], inputs: Inputs, d_out: Tensor) -> None:
    torch.autograd.grad(function(*inputs), inputs[:5], d_out)


def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    return cross_view_attention(q, k, v, gate, bias=bias, mask=mask, backend="cpp").out


def make_inputs(n: int, views: int, dtype: torch.dtype, masked: bool) -> tuple[Inputs, Tensor]:
    """Slices of one packed tensor as leaves, bias in float32, and the gradient of out."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(n, views, 3, HEADS, WIDTH, generator=generator).to(dtype)
    gate = torch.randn(n, views, HEADS, generator=generator).to(dtype)
    bias = torch.randn(HEADS, views, views, generator=generator)
    mask = None
    if masked:
        mask = torch.rand(n, views, generator=generator) > 0.2
        mask[:, 0] = True
    q, k, v, gate, bias = (x.detach().requires_grad_() for x in (*packed.unbind(2), gate, bias))
    return (q, k, v, gate, bias, mask), torch.randn(n, views, HEADS, WIDTH, generator=generator).to(dtype)


def check(views: int, dtype: torch.dtype, masked: bool) -> None:
    inputs, d_out = make_inputs(500, views, dtype, masked)

    def results(function: Callable[..., Tensor], to: torch.dtype | None) -> list[Tensor]:
        leaves = [x.detach().to(to or x.dtype).requires_grad_() for x in inputs[:5] if x is not None]
        out = function(*leaves, inputs[5])
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]

    def composed(*x: Tensor) -> Tensor:
        return reference(*x)[0]

    exact, own = results(composed, torch.float64), results(composed, None)
    require_parity(f"cross_view, V = {views}, {dtype}", results(ours, None), exact, own)


def compare(n: int, views: int, dtype: torch.dtype, masked: bool, repeats: int, copy: float) -> None:
    inputs, d_out = make_inputs(n, views, dtype, masked)
    # Eager PyTorch wants the bias in the inputs' type.
    theirs: Inputs = (*inputs[:4], inputs[4].detach().to(dtype).requires_grad_(), inputs[5])
    nbytes = d_out.nbytes
    title = f"N = {n:,}, V = {views}, {HEADS} heads x {WIDTH}, {dtype}{', masked' if masked else ''}"
    with torch.no_grad():
        forward = medians(
            {
                "umda_fast (and mass, entropy)": lambda: ours(*inputs),
                "eager": lambda: eager(*theirs),
                "scaled_dot_product_attention": lambda: sdpa(*theirs),
            },
            repeats,
        )
    report(f"forward, {title}", forward, {x: traffic_note(4 * nbytes, s, copy) for x, s in forward.items()})
    both = medians(
        {
            "umda_fast (and mass, entropy)": lambda: with_gradients(ours, inputs, d_out),
            "eager": lambda: with_gradients(eager, theirs, d_out),
            "scaled_dot_product_attention": lambda: with_gradients(sdpa, theirs, d_out),
        },
        repeats,
    )
    notes = {x: traffic_note(11 * nbytes, s, copy) for x, s in both.items()}
    report(f"forward + backward, {title}", both, notes)


def main() -> None:
    options = arguments(__doc__ or "")
    for count, views, dtype, masked in [
        (100_000, 3, torch.float32, False),
        (100_000, 3, torch.float32, True),
        (100_000, 3, torch.bfloat16, False),
        (30_000, 8, torch.float32, False),
    ]:
        check(views, dtype, masked)
        compare(int(count * options.size), views, dtype, masked, options.repeats, options.copy)


if __name__ == "__main__":
    main()
