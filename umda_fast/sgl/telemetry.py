"""What the Gram matrix tells about training; nothing here changes a gradient.

From the Gram matrix `G` [T, T] of the (smoothed) task gradients, with `n_t = sqrt(G_tt)` and
`C_st = G_st / (n_s n_t)`, over the pairs `s < t` of tasks seen so far:

- conflict share: the share of pairs with `C_st < 0`;
- norm ratio: `max_t n_t / min_t n_t`, tasks with a zero gradient left out;
- magnitude similarity: mean of `2 n_s n_t / (n_s^2 + n_t^2)`, 1 when all norms agree (Yu et al., "Gradient
  Surgery for Multi-Task Learning", NeurIPS 2020, definition 2);
- curvature bound: mean of `(1 - C_st^2) ||m_s - m_t||^2 / ||m_s + m_t||^2` (the same paper, definition 4);
- condition number of `G`, on the eigenvalues above `T * eps * largest`;
- cosine of the update `sum_t w_t m_t` to the plain mean of the task gradients.

How much the update itself fluctuates is measured in `variance`.
"""

import math

import torch
from torch import Tensor


def inverse_norms(norms: Tensor) -> Tensor:
    """1 / n, and 0 for a zero gradient, which no weight can make matter, and for one that is not finite."""
    return norms.reciprocal().nan_to_num(0.0, 0.0, 0.0)


def cosine_matrix(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [T] and cosines [T, T] of the rows behind a Gram matrix.

    Cosines with a zero row are 0, the diagonal is 1, and rounding beyond [-1, 1] is cut off.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    # Divided one side at a time: the product of two norms may leave the range of float32.
    inverse = inverse_norms(norms)
    cosines = (gram * inverse[:, None] * inverse[None, :]).clamp(-1, 1)
    return norms, cosines.fill_diagonal_(1)


def gram_metrics(gram: Tensor, weights: Tensor) -> dict[str, float]:
    """The figures of the module docstring, as floats (waits for the device).

    Args:
        gram: [T, T], any float dtype; only tasks that have been seen.
        weights: [T].
    """
    gram64 = gram.detach().to("cpu", torch.float64)
    weights64 = weights.detach().to("cpu", torch.float64)
    norms, cosines = cosine_matrix(gram64)
    count = gram64.shape[0]
    rows, columns = torch.triu_indices(count, count, offset=1)
    result: dict[str, float] = {}

    positive = norms[norms > 0]
    result["norm_ratio"] = float(positive.max() / positive.min()) if positive.numel() else math.nan

    both = (norms[rows] > 0) & (norms[columns] > 0)
    rows, columns = rows[both], columns[both]
    if rows.numel():
        cosine = cosines[rows, columns]
        first, second = norms[rows], norms[columns]
        inner = gram64[rows, columns]
        result["conflict_share"] = float((cosine < 0).double().mean())
        result["mean_cosine"] = float(cosine.mean())
        result["magnitude_similarity"] = float((2 * first * second / (first**2 + second**2)).mean())
        apart = first**2 + second**2 - 2 * inner
        together = (first**2 + second**2 + 2 * inner).clamp_min(torch.finfo(torch.float64).tiny)
        result["curvature_bound"] = float(((1 - cosine**2) * apart / together).mean())
    else:
        # One task cannot conflict with itself; the other figures are about pairs and have no value.
        result["conflict_share"] = 0.0
        result["mean_cosine"] = math.nan
        result["magnitude_similarity"] = math.nan
        result["curvature_bound"] = math.nan

    eigenvalues = torch.linalg.eigvalsh(gram64) if bool(gram64.isfinite().all()) else gram64.new_zeros(1)
    largest = float(eigenvalues[-1])
    kept = eigenvalues[eigenvalues > largest * count * torch.finfo(gram.dtype).eps]
    result["condition_number"] = largest / float(kept[0]) if largest > 0 else math.nan

    plain = torch.ones(count, dtype=torch.float64)
    squared = (weights64 @ gram64 @ weights64) * (plain @ gram64 @ plain)
    result["cosine_to_mean"] = (
        float((weights64 @ gram64 @ plain) / squared.sqrt()) if float(squared) > 0 else math.nan
    )
    return result
