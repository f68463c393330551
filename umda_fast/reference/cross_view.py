"""Hybrid cross-view attention over one vector per view (docs/model.md, section 1), in plain PyTorch."""

import math

import torch
from torch import Tensor

from umda_fast.reference._numerics import (
    accumulation_dtype,
    entropy_terms,
    gate_terms,
    masked_softmax,
    without_autocast,
)


@without_autocast
def cross_view(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blend every view with what it reads from the other present views of its instance.

    For instance i, head h and view u, over the present views w::

        a[u,w] = softmax_{w != u}( q[u].k[w] / sqrt(Dh) + bias[h,u,w] )
        g[u]   = sigmoid(gate_logits[u]),  1 where no other view is present, or the bias of each is -inf
        out[u] = g[u] v[u] + (1 - g[u]) sum_w a[u,w] v[w]
        p[u,w] = g[u] if w == u else (1 - g[u]) a[u,w]
        mass   = mean_h p,   entropy[u] = -sum_w p[u,w] log p[u,w]

    Args:
        q, k, v: [N, V, H, Dh], any strides.
        gate_logits: [N, V, H].
        bias: [H, V, V] or None; its diagonal is ignored.
        mask: bool [N, V], True where the view is present; None when all are. Values at absent views are never
            used (they may be NaN); their rows are zero in every output and every gradient.

    Returns:
        out [N, V, H, Dh] in q's dtype; mass [N, V, V] and entropy [N, V, H] in float32 (float64 for float64).
        All three are differentiable, twice. No data-dependent shapes: traceable by ``torch.compile``.
    """
    n, views, _, width = q.shape
    dtype = accumulation_dtype(q)
    present = torch.ones(n, views, dtype=torch.bool, device=q.device) if mask is None else mask
    absent = ~present[:, :, None]  # [N,u,1]
    qf, kf, vf = (x.to(dtype).masked_fill(absent[..., None], 0.0) for x in (q, k, v))
    gate = gate_logits.to(dtype).masked_fill(absent, 0.0)

    itself = torch.eye(views, dtype=torch.bool, device=q.device)  # [u,w]
    other = present[:, :, None] & present[:, None, :] & ~itself  # [N,u,w]
    scores = torch.einsum("nuhd,nwhd->nuhw", qf, kf) / math.sqrt(width)
    if bias is not None:
        scores = scores + bias.to(dtype).permute(1, 0, 2)  # [u,H,w]
    a, log_a, lse = masked_softmax(scores, other[:, :, None, :])  # [N,u,H,w]
    listens = lse != -math.inf  # [N,u,H]
    g, rest, gate_entropy = gate_terms(gate, listens)  # [N,u,H]

    out = g[..., None] * vf + rest[..., None] * torch.einsum("nuhw,nwhd->nuhd", a, vf)
    p = rest[..., None] * a + g[..., None] * itself[:, None, :]  # [N,u,H,w]
    # H(g, (1-g) a) = H(g, 1-g) + (1-g) H(a): no logarithm of a product that may underflow.
    entropy = gate_entropy + rest * entropy_terms(a, log_a).sum(-1)
    return (
        out.masked_fill(absent[..., None], 0.0).to(q.dtype),
        p.mean(2).masked_fill(absent, 0.0),
        entropy,
    )
