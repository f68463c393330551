"""What the reference operations share: dtypes, masked softmax, deterministic gather and scatter."""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid
from torch.utils.checkpoint import checkpoint


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def segment_index(ptr: Tensor, count: int) -> Tensor:
    """The segment that owns each of ``count`` elements: int64 [count] from offsets ``ptr`` [segments + 1].

    ``right=True`` steps over empty segments, whose offset repeats.
    """
    return torch.searchsorted(ptr, torch.arange(count, device=ptr.device), right=True) - 1


def gather(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` along the first axis. Its gradient is `scatter_sum`, in a fixed order on CPU and CUDA.

    (``index_select`` reads the same, but its gradient is ``index_add``, which uses atomics on CUDA.)
    """
    if index.numel() == 0:  # whose second derivative `embedding` cannot reshape
        return x[:0].reshape(*index.shape, *x.shape[1:])
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return embedding(index, flat).reshape(*index.shape, *x.shape[1:])


def scatter_sum(values: Tensor, index: Tensor, count: int) -> Tensor:
    """``out[index[e]] += values[e]``, out [count, ...], in a fixed order. Its gradient is `gather`."""
    if index.numel() == 0:
        return values.sum(0).expand(count, *values.shape[1:]).clone(memory_format=torch.contiguous_format)
    flat = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    out: Tensor = torch.ops.aten.embedding_dense_backward(flat, index, count, -1, False)
    return out.reshape(count, *values.shape[1:])


def with_zero_row(x: Tensor) -> Tensor:
    """``x`` [n, ...] and one row of zeros at index n, for absent indices to read: no NaN leaks from there."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def masked_softmax(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the last axis restricted to ``allowed`` and scores above -inf: probabilities, their logarithms,
    logsumexp.

    Where nothing is left the probabilities and logarithms are 0 and the logsumexp is -inf, with zero
    gradient: such a row is made harmless before the softmax and masked again after it, for 0 * NaN is NaN
    in a gradient.
    """
    allowed = allowed & (scores != -math.inf)
    some = allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed, -math.inf).masked_fill(~some, 0.0)
    lse = scores.logsumexp(-1, keepdim=True)
    log_p = scores - lse
    p = log_p.exp().masked_fill(~allowed, 0.0)
    return p, log_p.masked_fill(~allowed, 0.0), lse.masked_fill(~some, -math.inf).squeeze(-1)


def entropy_terms(p: Tensor, log_p: Tensor) -> Tensor:
    """``-p log p`` with 0 log 0 = 0, in value and in gradient."""
    return p * (0.0 - log_p.masked_fill(p == 0, 0.0))  # 0 - x: an entropy is 0, not -0


def gate_terms(gate_logits: Tensor, open_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``g``, ``1 - g`` and the entropy of (g, 1 - g) for g = sigmoid(gate_logits); g = 1 where not ``open_``.

    Everything goes through log g and log(1 - g): 1 - g by subtraction has no digits left at a logit of 16,
    and the derivative of g log g taken at g = 0 is 0 * inf.
    """
    log_g = logsigmoid(gate_logits).masked_fill(~open_, 0.0)
    log_rest = logsigmoid(-gate_logits)
    g = log_g.exp()
    rest = log_rest.exp().masked_fill(~open_, 0.0)
    return g, rest, entropy_terms(g, log_g) + entropy_terms(rest, log_rest)


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, whose intermediate values are computed again in backward instead of being kept."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` with autocast off, which would take its matrix products in half precision.

    An operation returns what its inputs' dtypes promise, wherever it is called; who wants it in half precision gives
    it such inputs. The device is that of the first tensor among the arguments.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if device == "meta":  # has no autocast; torch 2.11 cannot trace `torch.amp.is_autocast_available`
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
