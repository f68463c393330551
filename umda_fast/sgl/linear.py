"""Gradients of linear layers' weights, made where they are wanted instead of made, kept and copied.

The gradient of a weight that one linear layer uses once is `d_out^T x`: autograd is asked for `d_out`, the gradient on
what the layer returned, and the product is written into the row of the task (`umda_fast.ops.linear_weight_gradient`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from umda_fast.ops import linear_weight_gradient
from umda_fast.sgl.buffers import write_row
from umda_fast.sgl.graph import Reach

_unknown = object()
#: Elements from which on a weight is worth it.
LEAST = 1 << 14


class LinearUse:
    """The use of a weight: `edge`, where the gradient on the layer's output is asked for, and its input `x` [B, I]."""

    def __init__(self, edge: GradientEdge, x: Tensor) -> None:
        self.edge = edge
        self.x = x


def linear_uses(reach: Reach, parameters: Sequence[Tensor]) -> list[LinearUse | None]:
    """For each parameter its use by a linear layer, None unless that is the only one on the way of the losses.

    A layer is recognised by its node in the autograd graph: a product of two matrices, the second of which is the
    transpose of the weight. So a weight used twice, under autocast, through a parametrisation, or with a hook is left
    to autograd.
    """
    return [
        _use(p, reach.nodes[id(p)], reach.users)
        if p.dim() == 2
        and p.numel() >= LEAST
        and p.is_contiguous()
        and not p._backward_hooks
        and p in reach
        else None
        for p in parameters
    ]


def _use(weight: Tensor, leaf: Any, users: dict[Any, list[tuple[Any, int]]]) -> LinearUse | None:
    if len(users.get(leaf, ())) != 1:
        return None
    transpose = users[leaf][0][0]
    if transpose.name() != "TBackward0" or len(users.get(transpose, ())) != 1:
        return None
    product, place = users[transpose][0]
    if product.name() == "AddmmBackward0" and place == 2 and product._saved_alpha == 1:
        saved = "mat1"
    elif product.name() == "MmBackward0" and place == 1:
        saved = "self"
    else:
        return None
    # Where a hook unpacks what was saved, to look is to do its work: a checkpoint would run its part once more.
    if getattr(getattr(product, f"_raw_saved_{saved}"), "unpack_hook", _unknown) is not None:
        return None
    x = getattr(product, f"_saved_{saved}")
    if x is None or x.dtype != weight.dtype or x.layout != torch.strided or x.shape[1:] != weight.shape[1:]:
        return None
    return LinearUse(GradientEdge(product, 0), x.detach())


def write_gradients(
    views: Sequence[Tensor],
    found: Sequence[Tensor | None],
    uses: Sequence[LinearUse | None],
    backend: str | None,
) -> None:
    """One task's row: `found` holds the gradient on the layer's output where there is a use, else the parameter's own.

    What is None counts as zeros.
    """
    rest: list[tuple[Tensor, Tensor | None]] = []
    for view, gradient, use in zip(views, found, uses, strict=True):
        if use is None or gradient is None:
            rest.append((view, gradient))
        else:
            # cuBLAS serves other devices; on the CPU the operation beats the library.
            chosen = backend if view.device.type == "cpu" else "reference"
            linear_weight_gradient(gradient, use.x, view, backend=chosen)
    write_row([view for view, _ in rest], [gradient for _, gradient in rest])
