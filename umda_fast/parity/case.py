"""What one case of parity is: an operation on one shape, and how to run it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
#: A function of the inputs and of the backend's name, through the public functions.
Run = Callable[[Inputs, str], Outputs]


@dataclass(frozen=True)
class Case:
    """One operation on one shape. All of its floating inputs are made in float64."""

    op: str  #: name in the namespace ``umda_fast``
    shape: str  #: what is special about it
    inputs: Inputs
    run: Run
    storage: tuple[str, ...]  #: inputs rounded to the dtype under test; other floats go to the accumulation dtype
    gradients: tuple[str, ...] = ()  #: inputs whose gradients are compared
    composition: Run | None = None  #: PyTorch's composition; None: the reference in the dtype under test
    weights: dict[str, Tensor] = field(default_factory=dict)  #: one gradient per output, float64, drawn on demand

    def rounded(self, dtype: torch.dtype, device: str) -> Inputs:
        """The inputs as an implementation of ``dtype`` gets them."""
        wide = torch.promote_types(dtype, torch.float32)
        kinds = {name: dtype if name in self.storage else wide for name in self.inputs}
        return {name: (x.to(kinds[name]) if x.is_floating_point() else x).to(device) for name, x in self.inputs.items()}

    def evaluate(self, inputs: Inputs, backend: str) -> tuple[Outputs, Outputs]:
        """Outputs, and the gradients of one fixed combination of all of them."""
        run = self.composition if backend == "composition" and self.composition is not None else self.run
        name = "reference" if backend == "composition" else backend
        leaves = {x: inputs[x].detach().requires_grad_() for x in self.gradients}
        outputs = run({**inputs, **leaves}, name)
        used = {x: y for x, y in outputs.items() if y.requires_grad}
        if not used:
            return outputs, {}
        cotangents = [self._weight(x, y).to(y) for x, y in used.items()]
        found = torch.autograd.grad(
            list(used.values()), list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
        )
        return {x: y.detach() for x, y in outputs.items()}, dict(zip(leaves, found, strict=True))

    def _weight(self, name: str, like: Tensor) -> Tensor:
        if name not in self.weights:
            # Values that every dtype holds exactly: all are asked for the same gradient.
            self.weights[name] = normal(*like.shape, seed=len(name) + 50).bfloat16().double()
        return self.weights[name]


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal values, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def offsets(sizes: Sequence[int]) -> Tensor:
    """int64 offsets of pieces of these sizes."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int64)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def exact_inputs(inputs: Mapping[str, Tensor]) -> Inputs:
    """The same values in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
