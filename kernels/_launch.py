"""One launch of a Triton kernel as data, so that one pinned configuration is run, interpreted and compiled.

``Launch.run`` launches it on the tensors it holds; ``umda_fast.kernels._aot.compile_launch`` compiles the
very same launch ahead of time from tensors on the ``meta`` device, for a chip that need not be there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "FLOAT_DTYPES",
    "Launch",
    "ceil_div",
    "check_device",
    "check_shape",
    "innermost_contiguous",
    "next_power_of_2",
    "run_all",
]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its run-time arguments in order, its compile-time ones by name, warps, stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    # Left alone, ptxas may spill a few registers to fit one more program on a multiprocessor.
    max_registers: int | None = None

    def run(self) -> None:
        """Launches the kernel on the current stream; never waits for it."""
        if 0 in self.grid:
            return
        # Said aloud because Triton 3.9 announces that its default will change.
        self.kernel[self.grid](
            *self.args,
            **self.constexprs,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            maxnreg=self.max_registers,
            enable_fp_fusion=True,
        )


def run_all(launches: Sequence[Launch], device: torch.device) -> None:
    """Runs the launches in order on ``device``."""
    guard: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    with guard:
        for launch in launches:
            launch.run()


def check_device(name: str, tensor: torch.Tensor) -> None:
    """Raises ``ValueError`` unless a kernel can read ``tensor``: on CUDA, or anywhere when interpreted."""
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise ValueError(f"{name}: a Triton kernel needs a tensor on a CUDA device, got one on {tensor.device}")


def check_shape(
    name: str,
    tensor: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype | None,
    like: torch.Tensor,
) -> None:
    """Raises unless ``tensor`` is None, or has the shape, the dtype (None: any floating one) and ``like``'s
    device.

    A kernel reads by these and would otherwise read elsewhere.
    """
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype and (dtype is not None or not tensor.is_floating_point()):
        raise TypeError(f"{name}: expected {dtype or 'a floating dtype'}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")


def innermost_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself when its last dimension has stride 1 (or one element), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def ceil_div(a: int, b: int) -> int:
    """The least integer that is at least ``a / b``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()
