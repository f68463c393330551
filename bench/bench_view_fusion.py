"""view_fusion on the CPU against separate passes: ``python -m bench.bench_view_fusion``.

Floor: forward reads y and projected and writes z, (V D + V P + D) N elements; backward reads y, projected and d_z and
writes dy and d_projected. Separate passes are what the model took before: softmax and weighted sum, cosines of the
normalised projections, mean and variance of every view, each reading y or projected by itself, and what autograd makes
of them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.ops import fuse_views
from umda_fast.reference.view_fusion import view_fusion as reference

from .harness import arguments, medians, report, require_parity, traffic_note

Results = tuple[Tensor, ...]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def ours(y: Tensor, scores: Tensor, projected: Tensor, mask: Tensor | None) -> Results:
    out = fuse_views(y, scores, projected, mask=mask, backend="cpp")
    return out.z, out.beta, out.mean, out.variance, out.cosine_sum


def separate(y: Tensor, scores: Tensor, projected: Tensor, mask: Tensor | None) -> Results:
    """One pass after the other."""
    n, views, _ = y.shape
    hidden = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    beta = hidden.softmax(-1)
    z = (beta[..., None] * y).sum(1).to(y.dtype)
    unit = F.normalize(projected.float(), dim=-1, eps=1e-8)
    if mask is not None:
        unit = unit.masked_fill(~mask[..., None], 0.0)
    cosine_sum = (unit.sum(1).square().sum() - unit.square().sum()) / 2
    wide = y.float()
    present = wide.new_ones(n, views) if mask is None else mask.to(wide.dtype)
    share = (present / present.sum(0).clamp_min(1.0))[..., None]
    mean = (wide * share).sum(0)
    return z, beta, mean, ((wide - mean).square() * share).sum(0), cosine_sum


def make_inputs(n: int, views: int, width: int, dtype: torch.dtype, masked: bool) -> tuple[Inputs, list[Tensor]]:
    """Leaves, rows of missing views 0, and a gradient of every result."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    narrow = width // 2
    y, projected, mask = (
        normal(n, views, width).to(dtype),
        (normal(n, views, narrow) + normal(n, 1, narrow)).to(dtype),
        None,
    )
    if masked:
        mask = torch.rand(n, views, generator=generator) > 0.2
        mask[:, 0] = True
        y.masked_fill_(~mask[..., None], 0.0)
    leaves = tuple(x.requires_grad_() for x in (y, normal(n, views), projected))
    gradients = [normal(n, width).to(dtype), normal(n, views), normal(views, width), normal(views, width), normal(1)[0]]
    return (*leaves, mask), gradients


def with_gradients(function: Callable[..., Results], inputs: Inputs, gradients: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(function(*inputs), inputs[:3], gradients))


def check(width: int, dtype: torch.dtype, masked: bool) -> None:
    inputs, gradients = make_inputs(3000, 3, width, dtype, masked)

    def results(function: Callable[..., Results], to: torch.dtype | None) -> list[Tensor]:
        y, scores, projected = (x.detach().to(to or x.dtype).requires_grad_() for x in inputs[:3])
        given = (y, scores, projected, inputs[3])
        out = function(*given)
        wanted = [g.to(x.dtype) for g, x in zip(gradients, out, strict=True)]
        return [*(x.detach() for x in out), *with_gradients(function, given, wanted)]

    def exactly(*x: Tensor) -> Results:
        z, beta, mean, variance, _, cosine_sum, _ = reference(*x)
        return z, beta, mean, variance, cosine_sum

    exact, own = results(exactly, torch.float64), results(separate, None)
    require_parity(f"view_fusion, D = {width}, {dtype}", results(ours, None), exact, own)


def compare(n: int, width: int, dtype: torch.dtype, masked: bool, repeats: int, copy: float) -> None:
    inputs, gradients = make_inputs(n, 3, width, dtype, masked)
    y, _, projected, _ = inputs
    compiled = torch.compile(separate)
    title = f"N = {n:,}, V = 3, D = {width}, P = {width // 2}, {dtype}{', missing views' if masked else ''}"
    contenders = {"umda_fast": ours, "separate passes": separate, "torch.compile of them": compiled}
    forward_bytes = y.nbytes + projected.nbytes + gradients[0].nbytes
    both_bytes = forward_bytes + 2 * y.nbytes + 2 * projected.nbytes + gradients[0].nbytes
    with torch.no_grad():
        forward = medians({name: lambda f=f: f(*inputs) for name, f in contenders.items()}, repeats)
    report(f"forward, {title}", forward, {x: traffic_note(forward_bytes, s, copy) for x, s in forward.items()})
    both = medians({name: lambda f=f: with_gradients(f, inputs, gradients) for name, f in contenders.items()}, repeats)
    report(f"forward + backward, {title}", both, {x: traffic_note(both_bytes, s, copy) for x, s in both.items()})


def main() -> None:
    options = arguments(__doc__ or "")
    for width, dtype, masked in [
        (256, torch.float32, False),
        (256, torch.float32, True),
        (128, torch.float32, False),
        (256, torch.bfloat16, False),
    ]:
        check(width, dtype, masked)
        compare(int(100_000 * options.size), width, dtype, masked, options.repeats, options.copy)


if __name__ == "__main__":
    main()
