"""Gradients of linear layers' weights, made where they are wanted instead of made, kept and copied.

The gradient of a weight that one linear layer uses once is `d_out^T x`: autograd is asked for `d_out`, the gradient on
what the layer returned, and the product is written into the row of the task (`umda_fast.ops.linear_weight_gradient`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from umda_fast.ops import linear_weight_gradient
from umda_fast.sgl.buffers import write_row

#: Elements from which on a weight is worth it.
LEAST = 1 << 14


class LinearUse:
    """The use of a weight: `edge`, where the gradient on the layer's output is asked for, and its input `x` [B, I]."""

    def __init__(self, edge: GradientEdge, x: Tensor) -> None:
        self.edge = edge
        self.x = x


def linear_uses(losses: Iterable[Tensor], parameters: Sequence[Parameter]) -> list[LinearUse | None]:
    """For each parameter its use by a linear layer, None unless that is the only one on the way of the losses.

    A layer is recognised by its node in the autograd graph: a product of two matrices, the second of which is the
    transpose of the weight. So a weight used twice, under autocast, through a parametrisation, or with a hook is left
    to autograd.
    """
    leaves = {
        id(p)
        for p in parameters
        if p.dim() == 2 and p.numel() >= LEAST and not p._backward_hooks and p.layout == torch.strided
    }
    if not leaves:
        return [None] * len(parameters)
    users: dict[Any, list[tuple[Any, int]]] = {}
    nodes: dict[int, Any] = {}  # of the leaves
    stack: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for place, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            users.setdefault(following, []).append((node, place))
            if following not in seen:
                seen.add(following)
                stack.append(following)
                leaf = getattr(following, "variable", None)
                if leaf is not None and id(leaf) in leaves:
                    nodes[id(leaf)] = following
    return [_use(p, nodes[id(p)], users) if id(p) in nodes else None for p in parameters]


def _use(weight: Parameter, leaf: Any, users: dict[Any, list[tuple[Any, int]]]) -> LinearUse | None:
    if len(users[leaf]) != 1:
        return None
    transpose = users[leaf][0][0]
    if transpose.name() != "TBackward0" or len(users.get(transpose, ())) != 1:
        return None
    product, place = users[transpose][0]
    if product.name() == "AddmmBackward0" and place == 2 and product._saved_alpha == 1:
        x = product._saved_mat1
    elif product.name() == "MmBackward0" and place == 1:
        x = product._saved_self
    else:
        return None
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
