"""Hybrid cross-view attention over token sequences (docs/model.md, section 1)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.ops.cross_view import MAX_HEAD_DIM, MAX_VIEWS, MIN_HEAD_DIM
from umda_fast.reference.cross_view_tokens import cross_view_tokens as reference


class CrossViewTokensOutput(NamedTuple):
    """What `cross_view_token_attention` returns."""

    out: Tensor  #: [L, H, Dh]
    mass: Tensor  #: [L, V], how much a query token listens to every view, mean over heads
    entropy: Tensor  #: [L, H], of that mass, in nats
    token_entropy: Tensor | None  #: [L, H], of the cross-view softmax over tokens, in nats


def cross_view_token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    cu_tokens: Tensor,
    cu_segments: Tensor,
    view_of_segment: Tensor,
    num_views: int,
    *,
    bias: Tensor | None = None,
    token_entropy: bool = False,
    backend: str | None = None,
) -> CrossViewTokensOutput:
    """Blend attention over the tokens of a token's own view with attention over those of all other views.

    Every (instance, view) is a segment of tokens; two softmaxes, over the own view's tokens and over those of all
    other views of the instance, are blended by the gate of the query token (HCVA of Mahmood et al. 2026, with the
    equations of docs/model.md). With one token per segment it is `cross_view_attention`. O(tokens) memory, forward
    and backward.

    Args:
        q, k, v: [L, H, Dh], the tokens of all segments one after another; Dh in 8..256; float32, bfloat16 or
            float16 (float64 on the reference).
        gate_logits: [L, H], the same dtype: one gate per query token and head.
        cu_tokens: int64 [S+1]; segment s owns tokens ``cu_tokens[s]:cu_tokens[s+1]``.
        cu_segments: int64 [n+1]; instance i owns segments ``cu_segments[i]:cu_segments[i+1]``.
        view_of_segment: int32 [S], each in ``0..num_views-1``; two segments of one view count as one.
        num_views: V, 1..16.
        bias: float32 [H, V, V] (float64 for float64), or None; its diagonal is ignored. -inf is a mask, as in
            `cross_view_attention`.
        token_entropy: also return the entropy of the cross-view softmax over tokens.
        backend: see `umda_fast.set_backend`.

    Returns:
        out in q's dtype; mass, entropy and token_entropy (None when not asked for) float32 (float64 for float64).
        All carry gradients to q, k, v, gate_logits and bias.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; V or Dh out of range; offsets
            or views that are not what they must be.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _validate.tensor(q, "q", ["L", "H", "Dh"], dtype=_validate.FLOATS)
    tokens, heads, width = q.shape
    _validate.in_range(width, "Dh (q.shape[2])", MIN_HEAD_DIM, MAX_HEAD_DIM)
    _validate.in_range(num_views, "num_views", 1, MAX_VIEWS)
    _validate.tensor(k, "k", q.shape, like=q, like_name="q")
    _validate.tensor(v, "v", q.shape, like=q, like_name="q")
    _validate.tensor(gate_logits, "gate_logits", [tokens, heads], like=q, like_name="q")
    _validate.offsets(cu_tokens, "cu_tokens", tokens, "L", like=q)
    segments = cu_tokens.shape[0] - 1
    _validate.offsets(cu_segments, "cu_segments", segments, "S", like=q)
    _validate.tensor(view_of_segment, "view_of_segment", [segments], dtype=torch.int32, like=q, like_name="q")
    _validate.indices(view_of_segment, "view_of_segment", 0, num_views)
    if bias is not None:
        wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
        _validate.tensor(bias, "bias", [heads, num_views, num_views], dtype=wanted, like=q, like_name="q")
    chosen = resolve("cross_view_tokens", q, backend, (q, k, v, gate_logits, bias))
    function = reference if chosen == "reference" else _library.op(native("cross_view_tokens", chosen))
    out, mass, entropy, over_tokens, _, _ = function(
        q, k, v, gate_logits, cu_tokens, cu_segments, view_of_segment, num_views, bias, token_entropy
    )
    return CrossViewTokensOutput(out, mass, entropy, over_tokens if token_entropy else None)


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, num_views, _, token_entropy = rest
    tokens, heads, _ = q.shape

    def statistic(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=_library.wide(q))

    return (
        q.new_empty(q.shape),
        statistic(tokens, num_views),
        statistic(tokens, heads),
        statistic(tokens, heads) if token_entropy else statistic(0),
        statistic(tokens, heads),
        statistic(tokens, heads),
    )


def _fake_backward(
    d_out: Tensor | None,
    d_mass: Tensor | None,
    d_entropy: Tensor | None,
    d_token_entropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    _, _, _, num_views, *_ = rest  # after the three tensors of offsets and views
    d_bias = q.new_empty(q.shape[1], num_views, num_views, dtype=_library.wide(q))
    return (*(x.new_empty(x.shape) for x in (q, k, v, gate_logits)), d_bias)


def _setup_context(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.num_views, bias, ctx.token_entropy = inputs
    ctx.save_for_backward(*tensors, bias, *output[4:])
    ctx.mark_non_differentiable(*output[4:])  # lse: saved for backward, no result


def _backward(op: Any, ctx: _library.Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    d_out, d_mass, d_entropy, d_token_entropy, *_ = grads
    *inputs, bias, lse_intra, lse_cross = ctx.saved_tensors
    dq, dk, dv, d_gate, d_bias = op(
        d_out,
        d_mass,
        d_entropy,
        d_token_entropy if ctx.token_entropy else None,
        *inputs,
        ctx.num_views,
        bias,
        lse_intra,
        lse_cross,
    )
    return dq, dk, dv, d_gate, None, None, None, None, d_bias if bias is not None else None, None


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor gate_logits, Tensor cu_tokens, Tensor cu_segments, "
    "Tensor view_of_segment, int num_views, Tensor? bias"
)
_library.define(
    "cross_view_tokens",
    f"({_INPUTS}, bool token_entropy) -> (Tensor out, Tensor mass, Tensor entropy, Tensor token_entropy, "
    "Tensor lse_intra, Tensor lse_cross)",
    _fake,
    triton="cross_view_tokens",
)
_library.define(
    "cross_view_tokens_backward",
    f"(Tensor? d_out, Tensor? d_mass, Tensor? d_entropy, Tensor? d_token_entropy, {_INPUTS}, Tensor lse_intra, "
    "Tensor lse_cross) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_gate, Tensor d_bias)",
    _fake_backward,
    triton="cross_view_tokens",
)
_library.differentiable("cross_view_tokens", _setup_context, _backward)
