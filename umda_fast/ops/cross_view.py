"""Hybrid cross-view attention over one vector per view (docs/model.md, section 1)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.reference.cross_view import cross_view as reference

MAX_VIEWS = 16
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256


class CrossViewOutput(NamedTuple):
    """What `cross_view_attention` returns."""

    out: Tensor  #: [N, V, H, Dh]
    mass: Tensor  #: [N, V, V], how much view u listens to view w, mean over heads; rows of present views sum to 1
    entropy: Tensor  #: [N, V, H], of that mass, in nats


def cross_view_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> CrossViewOutput:
    """Blend every view of an instance with what it reads from the instance's other present views.

    ``out[u] = g v[u] + (1 - g) sum_w softmax_{w != u}(q[u].k[w]/sqrt(Dh) + bias[h,u,w]) v[w]`` with
    ``g = sigmoid(gate_logits[u])``, 1 where there is no other view to listen to (HCVA of Mahmood et al. 2026, with the
    equations of docs/model.md).

    Args:
        q, k, v: [N, V, H, Dh], V in 1..16, Dh in 8..256; float32, bfloat16 or float16 (float64 on the reference).
            Slices of one packed [N, V, 3, H, Dh] are read without a copy; a kernel copies only what is not
            contiguous along Dh.
        gate_logits: [N, V, H], the same dtype.
        bias: float32 [H, V, V] (float64 for float64), or None; its diagonal is ignored. -inf is a mask: the query
            view does not listen to that view. A query view that listens to none is as one without other views.
        mask: bool [N, V], True where a view is present; None when all are. Values of missing views are not read.
        backend: see `umda_fast.set_backend`.

    Returns:
        out in q's dtype; mass and entropy float32 (float64 for float64). Rows of missing views are 0. All three
        carry gradients to q, k, v, gate_logits and bias.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; V or Dh out of range; an
            instance with no view.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _validate.tensor(q, "q", ["N", "V", "H", "Dh"], dtype=_validate.FLOATS)
    n, views, heads, width = q.shape
    _validate.in_range(views, "V (q.shape[1])", 1, MAX_VIEWS)
    _validate.in_range(width, "Dh (q.shape[3])", MIN_HEAD_DIM, MAX_HEAD_DIM)
    _validate.tensor(k, "k", [n, views, heads, width], like=q, like_name="q")
    _validate.tensor(v, "v", [n, views, heads, width], like=q, like_name="q")
    _validate.tensor(gate_logits, "gate_logits", [n, views, heads], like=q, like_name="q")
    if bias is not None:
        wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
        _validate.tensor(bias, "bias", [heads, views, views], dtype=wanted, like=q, like_name="q")
    if mask is not None:
        _validate.tensor(mask, "mask", [n, views], dtype=torch.bool, like=q, like_name="q")
        _validate.views_present(mask, "mask")
    chosen = resolve("cross_view", q, backend, (q, k, v, gate_logits, bias))
    if chosen == "reference":
        return CrossViewOutput(*reference(q, k, v, gate_logits, bias, mask))
    return CrossViewOutput(*_library.op(native("cross_view", chosen))(q, k, v, gate_logits, bias, mask))


def _fake(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, views, heads, _ = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty(n, views, views, dtype=_library.wide(q)),
        q.new_empty(n, views, heads, dtype=_library.wide(q)),
    )


def _fake_backward(
    d_out: Tensor | None,
    d_mass: Tensor | None,
    d_entropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, views, heads, _ = q.shape
    d_bias = q.new_empty(heads, views, views, dtype=_library.wide(q))
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        gate_logits.new_empty(gate_logits.shape),
        d_bias,
    )


def _setup_context(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(op: Any, ctx: _library.Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk, dv, d_gate, d_bias = op(*grads, *ctx.saved_tensors)
    return dq, dk, dv, d_gate, d_bias if ctx.needs_input_grad[4] else None, None


_library.define(
    "cross_view",
    "(Tensor q, Tensor k, Tensor v, Tensor gate_logits, Tensor? bias, Tensor? mask) -> "
    "(Tensor out, Tensor mass, Tensor entropy)",
    _fake,
    triton="cross_view",
)
_library.define(
    "cross_view_backward",
    "(Tensor? d_out, Tensor? d_mass, Tensor? d_entropy, Tensor q, Tensor k, Tensor v, Tensor gate_logits, "
    "Tensor? bias, Tensor? mask) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_gate, Tensor d_bias)",
    _fake_backward,
    triton="cross_view",
)
_library.differentiable("cross_view", _setup_context, _backward)
