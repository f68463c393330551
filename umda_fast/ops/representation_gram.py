"""Gram matrix of task gradients on the instances behind an attention pooling (docs/model.md, section 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.reference.representation_gram import representation_gram as reference


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
    *,
    backend: str | None = None,
) -> Tensor:
    """Inner products of the gradients that S losses have on z, from the gradients they have on the pooled bags.

    For ``s = (tanh(z W_a^T + a) * sigmoid(z W_b^T + b)) W^T``, ``A = softmax of s in each bag`` and
    ``pooled[b,t] = sum_i A[i,t] z[i]`` (the gated attention pooling of Ilse et al. 2018), the gradient of a loss on
    z[i] has a part through the sum and one through the scores. Both are formed for a few instances at a time,
    multiplied and forgotten: one pass over z for all losses, no tensor [S, N, D].

    Args:
        d_pooled: S >= 1 tensors [B, T, D] of pooled's dtype: the gradient of each loss on ``pooled``.
        z: [N, D] instances, float32, bfloat16 or float16 (float64 on the reference), any strides.
        attention: [N, T], A, in float32 (float64 for float64).
        ptr: int64 [B+1]; bag b owns instances ``ptr[b]:ptr[b+1]``.
        pooled: [B, T, D], z's dtype.
        value: [N, H], the tanh; gate: [N, H], the sigmoid; any of the dtypes, both the same.
        score_weight: [T, H], W. value_weight: [H, D], W_a. gate_weight: [H, D], W_b. Used in float32.
        backend: see `umda_fast.set_backend`.

    Returns:
        gram [S, S] in float32 (float64 for float64), symmetric, products summed in float64 from short float32
        chains on. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, or a ``ptr`` that does not
            start at 0, decreases or does not end at N.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _validate.tensor(z, "z", ["N", "D"], dtype=_validate.FLOATS)
    n, width = z.shape
    wide = _library.wide(z)
    _validate.tensor(attention, "attention", [n, "T"], dtype=wide, like=z, like_name="z")
    tasks = attention.shape[1]
    _validate.offsets(ptr, "ptr", n, "N", like=z)
    shape = [ptr.shape[0] - 1, tasks, width]
    _validate.tensor(pooled, "pooled", shape, like=z, like_name="z")
    if len(d_pooled) == 0:
        raise ValueError("d_pooled must hold at least one tensor, got none")
    for s, gradient in enumerate(d_pooled):
        _validate.tensor(gradient, f"d_pooled[{s}]", shape, like=z, like_name="z")
    _validate.tensor(value, "value", [n, "H"], dtype=_validate.FLOATS, like=z, like_name="z")
    hidden = value.shape[1]
    _validate.tensor(gate, "gate", [n, hidden], like=value, like_name="value")
    floats = _validate.FLOATS
    _validate.tensor(score_weight, "score_weight", [tasks, hidden], dtype=floats, like=z, like_name="z")
    _validate.tensor(value_weight, "value_weight", [hidden, width], dtype=floats, like=z, like_name="z")
    _validate.tensor(gate_weight, "gate_weight", [hidden, width], dtype=floats, like=z, like_name="z")
    chosen = resolve("representation_gram", z, backend)
    rest = (z, attention, ptr, pooled, value, gate)
    weights = (score_weight, value_weight, gate_weight)
    if chosen == "reference":
        return reference(d_pooled, *rest, *weights)
    with torch.no_grad():
        gram: Tensor = _library.op(native("representation_gram", chosen))(
            list(d_pooled), *rest, *(w.to(wide) for w in weights)
        )
    return gram


def _fake(d_pooled: list[Tensor], z: Tensor, *_: Tensor) -> Tensor:
    return z.new_empty(len(d_pooled), len(d_pooled), dtype=_library.wide(z))


_library.define(
    "representation_gram",
    "(Tensor[] d_pooled, Tensor z, Tensor attention, Tensor ptr, Tensor pooled, Tensor value, Tensor gate, "
    "Tensor score_weight, Tensor value_weight, Tensor gate_weight) -> Tensor",
    _fake,
)
