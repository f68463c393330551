"""What the tests of the reference share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A normal tensor that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def check_gradients(function: Callable[..., Any], inputs: Sequence[Tensor], twice: bool = True) -> None:
    """First and second derivatives of every floating output in every input, against finite differences."""
    assert gradcheck(function, inputs)
    if twice:
        assert gradgradcheck(function, inputs, fast_mode=True)


def with_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a fixed random combination of all of them that are finite."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    used = [x for x in outputs if x.requires_grad]
    weights = [leaf(*x.shape, seed=i).detach().to(x.dtype) for i, x in enumerate(used)]
    return [x.detach() for x in outputs], list(torch.autograd.grad(used, inputs, weights))


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors hold the same values, a NaN being equal to a NaN."""
    pairs = zip(a, b, strict=True)
    return all(x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan()) for x, y in pairs) and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True)
    )


def check_repeats(function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Outputs and gradients have the same bits each time, with two threads.

    PyTorch raises at any operation that it knows not to be deterministic.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        (outputs, gradients), *others = [with_gradients(function, inputs) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for other in others:
        assert same_bits(outputs + gradients, other[0] + other[1])


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@contextmanager
def saved_tensors() -> Iterator[dict[int, int]]:
    """The bytes of every storage that forward keeps for backward, by address."""
    kept: dict[int, Tensor] = {}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = x  # alive, so that no address is used twice
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


@contextmanager
def largest_tensor() -> Iterator[_Largest]:
    """Sees every tensor that is made, forward and backward, and keeps the bytes of the largest."""
    with _Largest() as largest:
        yield largest
