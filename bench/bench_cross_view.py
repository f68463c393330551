"""cross_view on the CPU against what PyTorch composes: ``python -m bench.bench_cross_view``.

Floor: forward reads q, k, v and writes out (4 times N*V*H*Dh elements), backward reads four and writes three.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import umda_fast.ops  # noqa: F401  (defines the operations)
from bench.harness import arguments, copy_rate, medians, report

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


def ours_forward(inputs: Inputs) -> Tensor:
    out: Tensor = torch.ops.umda_fast.cross_view(*inputs)[0]
    return out


def ours_both(inputs: Inputs, d_out: Tensor) -> None:
    torch.ops.umda_fast.cross_view(*inputs)
    torch.ops.umda_fast.cross_view_backward(d_out, None, None, *inputs)


def main() -> None:
    options = arguments(__doc__ or "")
    for count, views, dtype, masked in [
        (100_000, 3, torch.float32, False),
        (100_000, 3, torch.float32, True),
        (100_000, 3, torch.bfloat16, False),
        (30_000, 8, torch.float32, False),
    ]:
        n = int(count * options.size)
        generator = torch.Generator().manual_seed(0)
        packed = torch.randn(n, views, 3, HEADS, WIDTH, generator=generator).to(dtype)
        gate = torch.randn(n, views, HEADS, generator=generator).to(dtype)
        bias = torch.randn(HEADS, views, views, generator=generator)
        d_out = torch.randn(n, views, HEADS, WIDTH, generator=generator).to(dtype)
        mask = None
        if masked:
            mask = torch.rand(n, views, generator=generator) > 0.2
            mask[:, 0] = True
        plain: Inputs = (*packed.unbind(2), gate, bias, mask)  # type: ignore[assignment]
        own_bias = bias.to(dtype)
        own = [x.detach().requires_grad_() for x in (*packed.unbind(2), gate, own_bias)]
        leaves: Inputs = (*own, mask)  # type: ignore[assignment]
        nbytes = n * views * HEADS * WIDTH * packed.element_size()
        rate = copy_rate()
        title = f"N = {n:,}, V = {views}, {HEADS} heads x {WIDTH}, {dtype}{', masked' if masked else ''}"
        with torch.no_grad():
            forward = medians(
                {
                    "umda_fast (and mass, entropy)": lambda x=plain: ours_forward(x),
                    "eager": lambda x=leaves: eager(*x),
                    "scaled_dot_product_attention": lambda x=leaves: sdpa(*x),
                },
                options.repeats,
            )
        floor = {name: f"{4 * nbytes / rate / s:5.0%} of the copy rate" for name, s in forward.items()}
        report(f"forward, {title}", forward, floor)
        both = medians(
            {
                "umda_fast (and mass, entropy)": lambda x=plain, g=d_out: ours_both(x, g),
                "eager": lambda x=leaves, g=d_out: with_gradients(eager, x, g),
                "scaled_dot_product_attention": lambda x=leaves, g=d_out: with_gradients(sdpa, x, g),
            },
            options.repeats,
        )
        floor = {name: f"{11 * nbytes / rate / s:5.0%} of the copy rate" for name, s in both.items()}
        report(f"forward + backward, {title}", both, floor)


if __name__ == "__main__":
    main()
