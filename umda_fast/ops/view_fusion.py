"""Fusion of views in one sweep, with what the penalties on views need (docs/model.md, section 1)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.ops.cross_view import MAX_VIEWS
from umda_fast.reference.view_fusion import view_fusion as reference


class ViewFusionOutput(NamedTuple):
    """What `fuse_views` returns."""

    z: Tensor  #: [N, D], sum of the views weighted by beta
    beta: Tensor  #: [N, V], softmax of the scores over the present views
    mean: Tensor  #: [V, D], over the instances that have the view
    variance: Tensor  #: [V, D], the population's
    instances: Tensor  #: int64 [V], how many have the view
    cosine_sum: Tensor  #: scalar, over all pairs of present views of all instances
    pairs: Tensor  #: int64 scalar, how many pairs those are


def fuse_views(
    y: Tensor,
    scores: Tensor,
    projected: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> ViewFusionOutput:
    """Fuse the views of every instance, and take the moments of the views and the cosines between them.

    ``beta[i] = softmax over present u of scores[i,u]``, ``z[i] = sum_u beta[i,u] y[i,u]``; mean and variance of
    every view and feature over the instances that have the view; the sum of ``cos(projected[i,u], projected[i,w])``
    over u < w present (equations of docs/model.md). y and projected are read once; gradients recompute.

    Args:
        y: [N, V, D], V in 1..16; float32, bfloat16 or float16 (float64 on the reference).
        scores: [N, V], one of the same dtypes (float64 where y is).
        projected: [N, V, P], one of the same dtypes, or None when no cosines are wanted. Norms are clamped at 1e-8.
        mask: bool [N, V], True where a view is present; None when all are. Values of missing views are not read.
        backend: see `umda_fast.set_backend`.

    Returns:
        z in y's dtype; beta, mean, variance and cosine_sum float32 (float64 for float64), which like z carry
        gradients to y, scores and projected; counts int64. beta is 0 at missing views, and so are their gradients;
        of an instance whose present views all have scores of -inf it is 0.
        A view that no instance has has mean and variance 0.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; V out of range; an instance
            with no view.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _validate.tensor(y, "y", ["N", "V", "D"], dtype=_validate.FLOATS)
    n, views, _ = y.shape
    _validate.in_range(views, "V (y.shape[1])", 1, MAX_VIEWS)
    # Each may be narrower than the other, as autocast makes them; float64 is the reference's alone.
    floats = (torch.float64,) if y.dtype == torch.float64 else _validate.FLOATS[:-1]
    _validate.tensor(scores, "scores", [n, views], dtype=floats, like=y, like_name="y")
    if projected is not None:
        _validate.tensor(projected, "projected", [n, views, "P"], dtype=floats, like=y, like_name="y")
    if mask is not None:
        _validate.tensor(mask, "mask", [n, views], dtype=torch.bool, like=y, like_name="y")
        _validate.views_present(mask, "mask")
    chosen = resolve("view_fusion", y, backend, (y, scores, projected))
    if chosen == "reference":
        return ViewFusionOutput(*reference(y, scores, projected, mask))
    return ViewFusionOutput(*_library.op(native("view_fusion", chosen))(y, scores, projected, mask)[:-1])


def _fake(y: Tensor, scores: Tensor, projected: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:
    n, views, width = y.shape

    def statistic(*shape: int) -> Tensor:
        return y.new_empty(shape, dtype=_library.wide(y))

    return (
        y.new_empty(n, width),
        statistic(n, views),
        statistic(views, width),
        statistic(views, width),
        y.new_empty(views, dtype=torch.int64),
        statistic(),
        y.new_empty((), dtype=torch.int64),
        statistic(views, width),
    )


def _fake_backward(
    d_z: Tensor | None,
    d_beta: Tensor | None,
    d_mean: Tensor | None,
    d_variance: Tensor | None,
    d_cosine_sum: Tensor | None,
    y: Tensor,
    scores: Tensor,
    projected: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_projected = y.new_empty(0) if projected is None else projected.new_empty(projected.shape)
    return y.new_empty(y.shape), scores.new_empty(scores.shape), d_projected


def _setup_context(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, mean, _, count, _, _, rest = output
    ctx.save_for_backward(*inputs, mean, rest, count)


def _backward(op: Any, ctx: _library.Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    d_z, d_beta, d_mean, d_variance, _, d_cosine_sum, _, _ = grads
    saved = ctx.saved_tensors
    dy, d_scores, d_projected = op(d_z, d_beta, d_mean, d_variance, d_cosine_sum, *saved)
    return dy, d_scores, d_projected if saved[2] is not None else None, None


# rest is what float32 leaves out of mean: far from 0 the variance's gradient, about the mean, would see it.
_library.define(
    "view_fusion",
    "(Tensor y, Tensor scores, Tensor? projected, Tensor? mask) -> (Tensor z, Tensor beta, Tensor mean, "
    "Tensor variance, Tensor count, Tensor cosine_sum, Tensor pairs, Tensor rest)",
    _fake,
    triton="view_fusion",
)
_library.define(
    "view_fusion_backward",
    "(Tensor? d_z, Tensor? d_beta, Tensor? d_mean, Tensor? d_variance, Tensor? d_cosine_sum, Tensor y, "
    "Tensor scores, Tensor? projected, Tensor? mask, Tensor mean, Tensor rest, Tensor count) -> (Tensor dy, "
    "Tensor d_scores, Tensor d_projected)",
    _fake_backward,
    triton="view_fusion",
)
_library.differentiable("view_fusion", _setup_context, _backward)
