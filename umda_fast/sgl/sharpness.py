"""Sharpness-aware minimisation around any backward call.

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021
(arXiv:2010.01412): the gradient is taken at `theta + rho g / ||g||` and applied at theta.

    sum(losses(model, batch).values()).backward()        # g, a plain backward
    with ascended(model.parameters(), rho=0.05):
        sgl.backward(losses(model, batch))               # second forward, at the shifted parameters
    optimizer.step()
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter


@contextmanager
def ascended(parameters: Iterable[Parameter], rho: float = 0.05) -> Iterator[None]:
    """Parameters at `theta + rho g / ||g||`, g their `.grad`, which is taken away; afterwards theta, bit for
    bit.

    One norm over all parameters; those without a gradient stay where they are, and a zero gradient moves
    nothing. No wait for the device. Costs a copy of the parameters. The parameters come back after an error
    as well.

    Args:
        parameters: with the gradient of a first backward pass in `.grad`.
        rho: length of the shift.

    Raises:
        ValueError: rho is not positive, or no parameter has a gradient.
    """
    if rho <= 0:
        raise ValueError(f"rho: expected more than 0, got {rho}")
    moved: list[Tensor] = [p for p in parameters if p.grad is not None]
    if not moved:
        raise ValueError("parameters: expected a gradient in .grad of at least one, got none")
    gradients = [p.grad if p.grad.layout == torch.strided else p.grad.to_dense() for p in moved if p.grad is not None]
    with torch.no_grad():
        norm = torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(gradients)]))
        factor = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
        saved = [p.detach().clone() for p in moved]
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.add_(gradient * factor.to(gradient.dtype))
            parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, saved)
