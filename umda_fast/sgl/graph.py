"""What losses reach: a walk through the autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: The node that adds to a leaf's `.grad`.
_LEAF = "AccumulateGrad"
#: The node of a re-entrant checkpoint, in PyTorch and in the libraries that have their own.
_REENTRANT = "CheckpointFunctionBackward"


class Reach:
    """What is behind some outputs.

    Attributes:
        leaves: tensors that get a `.grad`, each once, in the order a depth-first walk meets them.
        nodes: for each of them, by its id, the node that does.
        users: for each node the nodes that hand gradients to it, and as which of their inputs.
        reentrant: whether there is a re-entrant checkpoint, whose inside is not in the graph.
    """

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        self.leaves: list[Tensor] = []
        self.nodes: dict[int, Any] = {}
        self.users: dict[Any, list[tuple[Any, int]]] = {}
        self.reentrant = False
        stack: list[Any] = []
        for output in outputs:
            if output.grad_fn is not None:
                stack.append(output.grad_fn)
            elif output.requires_grad:
                self._leaf(output, None)
        seen = set(stack)
        self.users.update((node, []) for node in stack)
        while stack:
            node = stack.pop()
            kind = type(node).__name__
            if kind == _LEAF:
                self._leaf(node.variable, node)
                continue
            if kind == _REENTRANT:
                self.reentrant = True
            for place, (following, _) in enumerate(node.next_functions):
                if following in seen:
                    self.users[following].append((node, place))
                elif following is not None:
                    seen.add(following)
                    self.users[following] = [(node, place)]
                    stack.append(following)

    def _leaf(self, leaf: Tensor, node: Any) -> None:
        # One that was frozen since stays in the graph, and a backward pass leaves it alone.
        if leaf.requires_grad and id(leaf) not in self.nodes:
            self.leaves.append(leaf)
            self.nodes[id(leaf)] = node

    def __contains__(self, leaf: Tensor) -> bool:
        return id(leaf) in self.nodes


@dataclass(frozen=True)
class Look:
    """What a scope sees of this process's losses before anything is computed.

    Attributes:
        flags: what counts if it is so in any process (`Batch.flags`).
        hits: for each parameter of the scope whether the losses reach it.
        tasks: what the losses reach. penalty: what the penalty does. None where nobody asks.
    """

    flags: Sequence[bool] = ()
    hits: Sequence[bool] = ()
    tasks: Reach | None = None
    penalty: Reach | None = None
