"""What several blocks share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: where sums and ratios are taken under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """A block without autocast on x's device; meta tensors, for which PyTorch has none, are let through."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Constants(nn.Module):
    """A module with buffers whose values the configuration gives, so that no state dictionary holds them.

    They are there again wherever the module's parameters are: after `to_empty`, and after a state dictionary was
    assigned to a module that was made on meta.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(_refill)  # type: ignore[no-untyped-call]

    def register_constant(self, name: str, value: Any) -> None:
        """A buffer of this name from (nested) numbers."""
        self._values[name] = torch.tensor(value, dtype=torch.float64, device="cpu")
        self.register_buffer(name, torch.tensor(value, dtype=torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _refill(self)
        return self


@torch.no_grad()
def _refill(module: Constants, _: object = None) -> None:
    """Gives every constant its values, where it is, or where the parameters are if it is on meta alone."""
    for name, value in module._values.items():
        present = module.get_buffer(name)
        device = next(module.parameters()).device
        if not present.is_meta:
            present.copy_(value)  # in place: a CUDA graph reads it there
        elif device.type != "meta":
            setattr(module, name, value.to(device, present.dtype))
