"""Batching rules: every operation under ``torch.vmap``, one call of its kernel for each element of the batch.

What maps over tasks (``torch.autograd.grad(..., is_grads_batched=True)``, ``torch.func``, torchjd) has few of
them, and every kernel already fills the machine on its own, so a loop loses nothing to a batched kernel.

``vmap`` of ``torch.autograd.grad`` works, and a backward pass through a ``vmap``. ``torch.func.grad``, ``vjp`` and
``jacrev`` do not: PyTorch refuses them for every gradient of ``torch.library.register_autograd``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from umda_fast.ops import _library

#: Every operation that has Tensor arguments only (no lists) and writes to none of them.
_OPERATIONS = (
    "bag_pool",
    "bag_pool_backward",
    "cross_view",
    "cross_view_backward",
    "cross_view_tokens",
    "cross_view_tokens_backward",
    "dropout_add_norm",
    "dropout_add_norm_backward",
    "edge_cosine",
    "edge_cosine_backward",
    "gelu_dropout",
    "gelu_dropout_backward",
    "graph_order",
    "graph_transpose",
    "knn",
    "linear_residual",
    "neighbor_attention",
    "neighbor_attention_backward",
    "neighbor_sum",
    "neighbor_sum_backward",
    "norm_linear",
    "smoothness_energy",
    "smoothness_energy_backward",
    "view_fusion",
    "view_fusion_backward",
)


def _rule(op: Callable[..., Any]) -> Callable[..., Any]:
    """The batching rule of ``op``; any argument may have a batch dimension, wherever it is, or none."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        results = []
        for b in range(info.batch_size):
            pairs = zip(args, in_dims, strict=True)
            # Kernels take offsets and tables of indices contiguous only; a slice of dimension 0 is, without a copy.
            results.append(op(*(x if dim is None else x.select(dim, b).contiguous() for x, dim in pairs)))
        if not results:
            results = [_shapes(op, args, in_dims)]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        outputs = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def _shapes(op: Callable[..., Any], args: tuple[Any, ...], in_dims: tuple[int | None, ...]) -> Any:
    """What ``op`` would return for one element of an empty batch, uninitialised."""
    meta = []
    for x, dim in zip(args, in_dims, strict=True):
        if isinstance(x, Tensor):
            shape = [size for i, size in enumerate(x.shape) if i != dim]
            meta.append(torch.empty(shape, dtype=x.dtype, device="meta"))
        else:
            meta.append(x)
    device = next(x.device for x in args if isinstance(x, Tensor))
    return torch.utils._pytree.tree_map(lambda x: torch.empty_like(x, device=device), op(*meta))


for _name in _OPERATIONS:
    for _suffix in ["", "_triton"] if _library.has_triton(_name) else [""]:
        _op = f"{_name}{_suffix}"
        torch.library.register_vmap(f"{_library.NAMESPACE}::{_op}", _rule(_library.op(_op)))
