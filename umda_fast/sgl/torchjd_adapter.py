"""An adapter for the weightings, aggregators and scalarisers of torchjd (https://torchjd.org), as they are.

torchjd is an optional extra; nothing is imported from it until an adapter is made.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from umda_fast.sgl.balancers import Balancer


class TorchJDBalancer(Balancer):
    """Weights by an object of torchjd.

    - a weighting of the Gram matrix (`UPGradWeighting()`, ...) or an aggregator that has one (`UPGrad()`):
      its weights;
    - another aggregator with weights (`NashMTL(n_tasks)`): its weighting of a square root of the Gram matrix,
      since its weights depend on the gradients through their inner products only;
    - a scalariser of the losses (`scalarization.UW(n_tasks)`, ...): the derivative of the scalar by the
      losses.

    Weights are torchjd's own; most of its defaults have mean weights of 1 / T, which `scale` (default 1) can
    lift. State inside the torchjd object is not part of `SelfGuided.state_dict`.

    Args:
        source: the object.
        scale: factor on the weights.

    Raises:
        ImportError: torchjd is not installed.
        TypeError: the object is none of these.
    """

    synchronizes = True  # several of torchjd's solvers run on the host

    def __init__(self, source: Any, *, scale: float = 1.0) -> None:
        try:
            aggregation = import_module("torchjd.aggregation")
            scalarization = import_module("torchjd.scalarization")
        except ImportError as error:
            raise ImportError(
                "TorchJDBalancer: expected torchjd, install it with: pip install torchjd"
            ) from error
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
        else:
            got = type(source).__name__
            raise TypeError(
                f"source: expected a weighting, weighted aggregator or scalarizer of torchjd, got {got}"
            )

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """What the torchjd object gives, times `scale`."""
        if self._weighting is None:
            with torch.enable_grad():
                leaf = losses.detach().clone().requires_grad_()
                (found,) = torch.autograd.grad(self.source(leaf), leaf)
        elif self._root:
            values, vectors = torch.linalg.eigh(gram)
            found = self._weighting(vectors * values.clamp_min(0).sqrt())
        else:
            found = self._weighting(gram)
        return (self.scale * found.detach()).to(gram.dtype)
