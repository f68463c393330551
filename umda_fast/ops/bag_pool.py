"""Multi-task attention pooling of ragged bags (docs/model.md, section 2)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.reference.bag_pool import bag_pool as reference


class BagPoolOutput(NamedTuple):
    """What `bag_attention_pool` returns."""

    pooled: Tensor  #: [B, T, D]
    entropy: Tensor  #: [B, T], of the attention, in nats
    lse: Tensor  #: [B, T], logarithm of the softmax denominator


def bag_attention_pool(
    z: Tensor, scores: Tensor, ptr: Tensor, *, backend: str | None = None
) -> BagPoolOutput:
    """Pool the instances of every bag once per task, weighted by a softmax of the task's scores.

    ``A[i,t] = softmax over the instances i of bag b of scores[i,t]``, ``pooled[b,t] = sum_i A[i,t] z[i]``: the
    attention pooling of Ilse et al. (2018), for T tasks in one pass over z.

    Args:
        z: [N, D] instances, float32, bfloat16 or float16 (float64 on the reference), any strides.
        scores: [N, T], the same dtypes.
        ptr: int64 [B+1]; bag b owns instances ``ptr[b]:ptr[b+1]``. An empty bag is legal.
        backend: see `umda_fast.set_backend`.

    Returns:
        pooled [B, T, D] in z's dtype; entropy and lse float32 [B, T] (float64 for float64). An empty bag has 0, 0
        and -inf. All carry gradients to z and scores.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, or a ``ptr`` that does not
            start at 0, decreases or does not end at N.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _validate.tensor(z, "z", ["N", "D"], dtype=_validate.FLOATS)
    _validate.tensor(scores, "scores", [z.shape[0], "T"], dtype=_validate.FLOATS, like=z, like_name="z")
    _validate.offsets(ptr, "ptr", z.shape[0], "N", like=z)
    chosen = resolve("bag_pool", z, backend, (z, scores))
    if chosen == "reference":
        return BagPoolOutput(*reference(z, scores, ptr))
    return BagPoolOutput(*_library.op(native("bag_pool", chosen))(z, scores, ptr))


def _fake(z: Tensor, scores: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bags, tasks = ptr.shape[0] - 1, scores.shape[1]
    statistic = z.new_empty(bags, tasks, dtype=_library.wide(z))
    return z.new_empty(bags, tasks, z.shape[1]), statistic, torch.empty_like(statistic)


def _fake_backward(
    d_pooled: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    z: Tensor,
    scores: Tensor,
    *_: Tensor,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scores.new_empty(scores.shape)


def _setup_context(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(op: Any, ctx: _library.Context, *grads: Tensor | None) -> tuple[Tensor, Tensor, None]:
    dz, d_scores = op(*grads, *ctx.saved_tensors)
    return dz, d_scores, None


_library.define(
    "bag_pool",
    "(Tensor z, Tensor scores, Tensor ptr) -> (Tensor pooled, Tensor entropy, Tensor lse)",
    _fake,
)
_library.define(
    "bag_pool_backward",
    "(Tensor? d_pooled, Tensor? d_entropy, Tensor? d_lse, Tensor z, Tensor scores, Tensor ptr, Tensor pooled, "
    "Tensor entropy, Tensor lse) -> (Tensor dz, Tensor d_scores)",
    _fake_backward,
)
_library.differentiable("bag_pool", _setup_context, _backward)
