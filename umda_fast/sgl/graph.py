"""Which parameters a loss reaches: a walk through the autograd graph."""

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Parameter


def reached_leaves(outputs: Iterable[Tensor]) -> list[Parameter]:
    """Parameters behind `outputs`, each once, in the order a depth-first walk meets them."""
    seen = set()
    leaves: list[Parameter] = []
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        # The node that adds to a leaf's .grad, and only that one, has the leaf as `variable`.
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Parameter):
            leaves.append(leaf)
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return leaves
