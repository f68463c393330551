"""An adapter for the weightings, aggregators and scalarisers of torchjd (https://torchjd.org), as they are.

torchjd is an optional extra; nothing is imported from it until an adapter is made.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from umda_fast.extras import require
from umda_fast.sgl.balancers import Balancer

#: Weightings of torchjd that read single entries of the gradients, or several batches.
_MORE_THAN_GRAM = {"ExcessMTL", "MoDo", "SDMGrad"}


class TorchJDBalancer(Balancer):
    """Weights by an object of torchjd.

    - a weighting of the Gram matrix (`UPGradWeighting()`, ...) or an aggregator that has one (`UPGrad()`):
      its weights;
    - another aggregator with weights (`NashMTL(n_tasks)`): its weighting of a square root of the Gram matrix,
      since its weights depend on the gradients through their inner products only;
    - a scalariser of the losses (`scalarization.UW(n_tasks)`, `GeometricMean()`, ...): the derivative of the scalar by
      the losses. What it learns gets its gradient at the same time: its `parameters()` belong into the optimiser, as
      torchjd says, and `.grad` is added up until it is zeroed. Methods that torchjd wants called (`DWA.step`,
      `FAMO.update`) are called by whoever made it.

    Weights are torchjd's own; most of its defaults have mean weights of 1 / T, which `scale` (default 1) can
    lift. State inside the torchjd object is not part of `SelfGuided.state_dict`. An object for a fixed number of tasks
    raises torchjd's own error on a batch that lacks one.

    Args:
        source: the object.
        scale: factor on the weights.

    Raises:
        ImportError: torchjd is not installed.
        TypeError: the object is none of these, or its weights depend on more than inner products of one batch
            (`ExcessMTL`, for which there is `umda_fast.sgl.ExcessMTL`, `MoDo`, `SDMGrad`).
    """

    synchronizes = True  # several of torchjd's solvers run on the host

    def __init__(self, source: Any, *, scale: float = 1.0) -> None:
        require("TorchJDBalancer", "torchjd")
        aggregation = import_module("torchjd.aggregation")
        scalarization = import_module("torchjd.scalarization")
        self.scale = scale
        self.source = source
        self._weighting: Any = None
        self._root = False
        if isinstance(source, scalarization.Scalarizer):
            self.needs_gram = False
        elif isinstance(source, aggregation.GramianWeightedAggregator):
            self._weighting = source.gramian_weighting
        elif isinstance(source, aggregation.WeightedAggregator):
            self._weighting = source.weighting
            self._root = True
        elif isinstance(source, aggregation.Weighting):
            self._weighting = source
            self._root = any(kind.__name__ == "_MatrixWeighting" for kind in type(source).__mro__)
        else:
            got = type(source).__name__
            raise TypeError(
                f"source: expected a weighting, weighted aggregator or scalarizer of torchjd, got {got}"
            )
        more = type(self._weighting).__name__.removesuffix("Weighting")
        if more in _MORE_THAN_GRAM:
            raise TypeError(f"source: expected weights that depend on inner products of one batch only, got {more}")

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """What the torchjd object gives, times `scale`."""
        if self._weighting is None:
            found = self._derivative(losses)
        elif self._root:
            values, vectors = torch.linalg.eigh(gram)
            found = self._weighting(vectors * values.clamp_min(0).sqrt())
        else:
            found = self._weighting(gram)
        return (self.scale * found.detach()).to(gram.dtype)

    def _derivative(self, losses: Tensor) -> Tensor:
        """Of the scalar by the losses; that by the scalariser's own parameters is added to their `.grad`."""
        learned = [p for p in self.source.parameters() if p.requires_grad]
        with torch.enable_grad():
            leaf = losses.detach().clone().requires_grad_()
            found: list[Tensor | None] = list(
                torch.autograd.grad(self.source(leaf), [leaf, *learned], allow_unused=True)
            )
        for parameter, gradient in zip(learned, found[1:], strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return torch.zeros_like(losses) if found[0] is None else found[0]
