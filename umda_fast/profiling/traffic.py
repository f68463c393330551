"""Bytes that the operations of a step read and write, counted as PyTorch dispatches them, without a GPU.

For an operation: its tensors that are read, and those that are written, once each. A dimension of stride 0 counts once,
views count nothing, and of a fused operation what goes in and out: the least that memory must move for these
operations, if nothing stays in a cache between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from umda_fast.blocks import BlockRecord, Place

__all__ = ["Count", "Traffic", "tensor_bytes"]

# Views, memory that is only set aside, what asks for no tensor's values, and the marks of a profile itself.
_MOVE_NOTHING = {
    "aten::promote_types",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit",
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_permuted",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
# In-place operations that do not look at what was there.
_WRITE_ONLY = {
    "aten::bernoulli_",
    "aten::copy_",
    "aten::fill_",
    "aten::normal_",
    "aten::random_",
    "aten::uniform_",
    "aten::zero_",
}


@dataclass
class Count:
    """Of one operation at one place in the step."""

    calls: int = 0
    bytes: int = 0


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor; what is expanded counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Counts while it is active, by place in the step and name of the operation; what is outside of all blocks counts
    nothing.

    Args:
        record: knows the place.

    Attributes:
        counts: (place, operation) -> calls and bytes.
    """

    def __init__(self, record: BlockRecord) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self.counts: dict[tuple[Place, str], Count] = {}

    supports_higher_order_operators = True  # they pass; what they call is counted

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        place = self.record.here()
        if place is not None and isinstance(func, torch._ops.OpOverload):
            name = func._schema.name
            if not func.is_view and name not in _MOVE_NOTHING:
                count = self.counts.setdefault((place, name), Count())
                count.calls += 1
                count.bytes += _moved(func, args, kwargs, result)
        return result


def _moved(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes that a call read and wrote."""
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {id(leaf): leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = {id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written |= tensors
        if not (changed and (argument.is_out or func._schema.name in _WRITE_ONLY)):
            read |= tensors
    return sum(map(tensor_bytes, read.values())) + sum(map(tensor_bytes, written.values()))
