"""Gradients freed from conflict, in the Gram matrix: each becomes `sum_s A_ts g_s` with coefficients A [T, T].

Two ways. `freed_coefficients` meets all other gradients at once, again and again: it is continuous, and knows no
order. Methods that are published as one projection after the other take an order from the Gram matrix, the most
opposed first; what is equally opposed (`tied`) is met at once, so that how tasks are numbered plays no part.

What is met at once would be counted once for each of several gradients of one direction. With b_s >= 0 the steps that
each would make alone, in units of its own gradient, all are therefore made by the share

    min(1, sum_s b_s^2 / || sum_s b_s g_s / n_s ||^2)

which is 1 for one gradient or orthogonal ones, and 1/k for k of one direction. For a projection it is the step down
`|| g~_t + a sum_s b_s g_s / n_s ||` that ends at the minimum, no longer than that of each alone.
"""

import torch
from torch import Tensor

from umda_fast.sgl.telemetry import cosine_matrix, inverse_norms


def in_gradients(unit: Tensor, norms: Tensor) -> Tensor:
    """Coefficients [T, T] of the gradients, from those of the unit gradients, each row in units of its own norm."""
    coefficients = unit * norms[:, None] * inverse_norms(norms)[None, :]
    coefficients.diagonal().copy_(unit.diagonal())  # also where the norm is 0
    return coefficients


def share(steps: Tensor, cosines: Tensor) -> Tensor:
    """The share [T, 1] by which the steps [T, T] of each row are made when all are made at once."""
    squares = steps.square().sum(1, keepdim=True)
    length = ((steps @ cosines) * steps).sum(1, keepdim=True)
    # squares / length, at most 1, without a division by what may be 0.
    return squares / torch.maximum(length, squares).clamp_min(1e-300)


def tied(cosines: Tensor, resolution: float) -> Tensor:
    """Turn [T, T] in which row t meets gradient s: by growing cosine, together with those within `resolution`."""
    values, order = cosines.sort(dim=1, stable=True)
    later = (values[:, 1:] - values[:, :-1] > resolution).to(torch.int64)
    turns = torch.cat([torch.zeros_like(order[:, :1]), later.cumsum(1)], 1)
    return torch.empty_like(order).scatter(1, order, turns)


def resolution(dtype: torch.dtype) -> float:
    """Cosines closer than this cannot be told apart in a Gram matrix of `dtype`."""
    return 64 * torch.finfo(dtype).eps


def conflict_coefficients(gram: Tensor) -> Tensor:
    """Coefficients A [T, T], float64, of the gradients projected one after the other (PCGrad's rule).

    `g~_t` starts as `g_t` and meets the others, the most opposed first (lowest cosine with `g_t`; equal ones at once).
    Where `<g~_t, g_s> < 0` the conflicting component goes: `g~_t <- g~_t - <g~_t, g_s> / ||g_s||^2 g_s`. All
    coefficients are >= 0. As any order does, this one jumps where two cosines cross.

    Args:
        gram: [T, T].
    """
    norms, cosines = cosine_matrix(gram.double())
    turns = tied(cosines, resolution(gram.dtype))
    own = torch.eye(len(norms), dtype=torch.bool, device=gram.device)
    unit = own.to(cosines.dtype)
    for turn in range(len(norms)):
        met = (turns == turn) & ~own
        steps = torch.where(met, -(unit @ cosines), torch.zeros_like(cosines)).clamp_min(0)
        unit = unit + share(steps, cosines) * steps
    return in_gradients(unit, norms)


def freed_coefficients(gram: Tensor, threshold: float = 0.0) -> Tensor:
    """Coefficients A [T, T], float64, of the gradients freed from conflict without an order.

    T times: every gradient that `g~_t` conflicts with is projected out at once, by the share of the module's head.
    With two tasks it is the projection of each onto the other's normal plane. A is a continuous function of the
    gradients (at threshold 0, and where none is 0), whatever their rank. All coefficients are >= 0.

    Args:
        gram: [T, T].
        threshold: below 0, only gradients whose cosine with `g_t` lies below it are met.
    """
    norms, cosines = cosine_matrix(gram.double())
    own = torch.eye(len(norms), dtype=torch.bool, device=gram.device)
    left_alone = own if threshold == 0 else own | (cosines >= threshold)
    unit, met = own.to(cosines.dtype), cosines  # of the unit gradients with what `unit` has made of each
    for turn in range(len(norms)):
        met = unit @ cosines if turn else met
        steps = met.clamp_max(0).masked_fill(left_alone, 0)  # as they are to be taken off
        unit = torch.addcmul(unit, share(steps, cosines), steps, value=-1)
    return in_gradients(unit, norms)
