"""Derivatives that native kernels do not have: of second order, forward mode, and those of `torch.func`.

A kernel gives the gradient that ``Tensor.backward`` asks for. PyTorch takes whatever else it finds no rule for as
constant, in silence; here each is either an error or, where it is known before a backend is chosen, a reason for the
reference, whose composition has them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforms() -> bool:
    """Whether forward mode is on, or a transform of `torch.func` that differentiates."""
    functorch = torch._C._functorch
    if forward_ad._current_level >= 0:
        return True
    if functorch.peek_interpreter_stack() is None:
        return False
    kinds = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(level.key() in kinds for level in functorch.get_interpreter_stack() or [])


# Of a trace as a whole, which guards on it. (What torch.compiler.assume_constant_result sets, see _dispatch.py.)
transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def beyond_backward(inputs: Sequence[Any]) -> bool:
    """Whether forward mode or `torch.func` differentiates one of these; ``Tensor.backward`` alone does not count."""
    if not transforms():
        return False
    if torch.compiler.is_compiling():
        return True  # tensors of a trace do not say
    return any(isinstance(x, Tensor) and _differentiated(x) for x in inputs)


def _differentiated(x: Tensor) -> bool:
    functorch = torch._C._functorch
    kinds = {level.level(): level.key() for level in functorch.get_interpreter_stack() or []}
    innermost = max(kinds, default=0)
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            level = functorch.maybe_get_level(x)
            if kinds.get(level) != functorch.TransformType.Jvp:
                if x.requires_grad:
                    return True
            elif level != innermost or forward_ad.unpack_dual(x).tangent is not None:
                return True  # of another level than the innermost a tangent cannot be seen from here
        x = functorch.get_unwrapped(x)
    if kinds and x.requires_grad:
        return True  # a graph of plain autograd outside the transforms
    if forward_ad._current_level < 0 or functorch.TransformType.Jvp in kinds.values():
        return False
    # In a transform a tangent from outside cannot be seen either.
    return bool(kinds) or forward_ad.unpack_dual(x).tangent is not None


def first_order(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, the backward operation of operation ``name``; to differentiate what it returns is an error.

    Raises:
        NotImplementedError: from a call, where forward mode or `torch.func` differentiates an argument, or a graph
            is made of batched gradients; or later, where a backward pass comes through what the call returned.
    """

    def call(*args: Any) -> Any:
        # What a function of its own hangs on a tensor of `is_grads_batched` is lost with that tensor.
        if beyond_backward(args) or any(map(_legacy_batched, args)):
            raise NotImplementedError(_message(name))
        with torch.no_grad():
            found = kernel(*args)
        gradients = (found,) if isinstance(found, Tensor) else found
        sources = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        marked = _FirstOrder.apply(name, len(gradients), *gradients, *sources)  # type: ignore[no-untyped-call]
        return marked[0] if isinstance(found, Tensor) else marked

    return call


def _legacy_batched(x: Any) -> bool:
    return isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x)


def _message(name: str) -> str:
    return f'{name}: a native backend has first derivatives only; backend="reference" has higher ones'


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(_message(ctx.name))
