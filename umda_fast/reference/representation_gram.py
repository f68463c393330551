"""Gram matrix of task gradients on the instances behind an attention pooling (docs/model.md, section 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from umda_fast.reference._numerics import accumulation_dtype, gather, segment_index, without_autocast

#: Instances at a time: what is kept of their gradients is T * CHUNK * D numbers.
CHUNK = 1024


@without_autocast
@torch.no_grad()
def representation_gram(
    d_pooled: Sequence[Tensor],
    z: Tensor,
    attention: Tensor,
    ptr: Tensor,
    pooled: Tensor,
    value: Tensor,
    gate: Tensor,
    score_weight: Tensor,
    value_weight: Tensor,
    gate_weight: Tensor,
) -> Tensor:
    """Inner products of the gradients ``g_s[i]`` that S losses have on z [N, D], from those on the pooled bags.

    With P_s = d_pooled[s], for instance i of bag b::

        d_score_s[i,t] = A[i,t] (P_s[b,t] . z[i] - P_s[b,t] . pooled[b,t])
        c_s[i]         = sum_t d_score_s[i,t] score_weight[t]                                     [H]
        g_s[i]         = sum_t A[i,t] P_s[b,t]
                         + value_weight^T (c_s[i] gate (1 - value^2)) + gate_weight^T (c_s[i] value gate (1 - gate))
        gram[s,r]      = sum_i g_s[i] . g_r[i]

    Args:
        d_pooled: S tensors [B, T, D], the gradients of the losses on ``pooled``.
        z: [N, D]. attention: [N, T], A. ptr: int64 [B+1]. pooled: [B, T, D], ``sum_i A[i,t] z[i]``.
        value: [N, H], ``tanh(value_weight z + bias)``. gate: [N, H], ``sigmoid(gate_weight z + bias)``.
        score_weight: [T, H]; the scores are ``score_weight (value * gate)``. value_weight, gate_weight: [H, D].

    Returns:
        gram [S, S], float32 (float64 for float64), products summed in float64. Not differentiable.
    """
    dtype = accumulation_dtype(z)
    gradients = [p.to(dtype) for p in d_pooled]
    offsets = [(p * pooled.to(dtype)).sum(-1) for p in gradients]  # [B, T]
    weights = [w.to(dtype) for w in (score_weight, value_weight, gate_weight)]
    bag = segment_index(ptr, z.shape[0])
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=z.device)
    for start in range(0, z.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        own, a = bag[part], attention[part].to(dtype)
        zf, v, u = (x[part].to(dtype) for x in (z, value, gate))
        rows = []
        for p, offset in zip(gradients, offsets, strict=True):
            here = gather(p, own)  # [n, T, D]
            d_score = a * ((here * zf[:, None]).sum(-1) - gather(offset, own))
            c = d_score @ weights[0]
            row = (a[:, :, None] * here).sum(1)
            row += (c * u * (1 - v * v)) @ weights[1] + (c * v * u * (1 - u)) @ weights[2]
            rows.append(row.double().flatten())
        if rows:
            stacked = torch.stack(rows)
            gram += stacked @ stacked.T
    return gram.to(dtype)
