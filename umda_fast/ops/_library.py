"""The ``umda_fast`` namespace of ``torch.library``: schemas, fake implementations, gradients, native libraries.

Every operation is defined here in Python, whatever is installed; ``_C`` and ``_C_cuda`` only add kernels for a
device to it. Triton kernels are operations of their own, ``<name>_triton`` with the same schema: under
Triton's interpreter they serve CPU tensors beside the C++ kernels.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from umda_fast.ops._derivatives import first_order, transforms

NAMESPACE = "umda_fast"

#: Reason why a native library is not there, or None when it is loaded.
LibraryStatus = str | None

#: Whether Triton runs its kernels in Python on CPU tensors (fixed when triton is imported).
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

#: Operations that have a Triton kernel.
_triton_ops: set[str] = set()


class Context(Protocol):
    """What autograd hands to ``setup_context`` and ``backward``."""

    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Any) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


def define(name: str, schema: str, fake: Callable[..., Any], *, triton: str | None = None) -> None:
    """Define an operation.

    Args:
        name: its name in the namespace.
        schema: arguments and results, ``"(Tensor x) -> Tensor"``.
        fake: shapes, dtypes and devices of the results from those of the arguments.
        triton: module of `umda_fast.kernels` that holds the Triton kernel, a function called ``name``.
    """
    for op in [name] if triton is None else [name, f"{name}_triton"]:
        torch.library.define(f"{NAMESPACE}::{op}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake)
    if triton is not None:
        _triton_ops.add(name)

        def launch(*args: Any) -> Any:
            return getattr(importlib.import_module(f"umda_fast.kernels.{triton}"), name)(*args)

        devices = ["cuda", "cpu"] if TRITON_INTERPRETED else ["cuda"]
        torch.library.impl(f"{NAMESPACE}::{name}_triton", devices, func=launch)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums and statistics of x: float32, and float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def op(name: str) -> Any:
    """The callable ``torch.ops.umda_fast.<name>.default``."""
    return getattr(torch.ops.umda_fast, name).default


def differentiable(
    name: str,
    setup_context: Callable[[Context, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    *,
    backward_op: bool = True,
) -> None:
    """Attach a gradient to ``name`` and to its Triton twin.

    ``backward(op, ctx, *grads)`` gets the backward operation of the same backend as ``op``; gradients of
    outputs that nobody used arrive as None; what it returns cannot be differentiated again, and says so. Without an
    operation of its own it is PyTorch's composition, ``backward(ctx, *grads)``, which must hold for every order.
    """
    for suffix in ["", "_triton"] if name in _triton_ops else [""]:

        def run(ctx: Context, *grads: Any, suffix: str = suffix) -> Any:
            if not backward_op:
                return backward(ctx, *grads)
            kernel = op(f"{name}_backward{suffix}")
            if torch.is_grad_enabled() or transforms():
                kernel = first_order(name, kernel)
            return backward(kernel, ctx, *grads)

        def setup(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        torch.library.register_autograd(f"{NAMESPACE}::{name}{suffix}", run, setup_context=setup)


def has_kernel(name: str, key: str) -> bool:
    """Whether a kernel for dispatch key ``key`` ("CPU", "CUDA") is registered for operation ``name``."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key))


def has_triton(name: str) -> bool:
    """Whether operation ``name`` has a Triton kernel."""
    return name in _triton_ops


def _load(file: str) -> LibraryStatus:
    path = Path(__file__).resolve().parent.parent / file
    if not path.is_file():
        why = path.with_name(f"{file.partition('.')[0]}.failed.txt")  # written by setup.py
        said = " ".join(why.read_text(encoding="utf-8", errors="replace").split()) if why.is_file() else ""
        reason = f": {said[:300]}" if said else " (reinstall with a compiler and without build isolation)"
        return f"umda_fast/{file} was not built{reason}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"umda_fast/{file} does not load: {error}"
    return None


cpp_status: LibraryStatus = _load("_C.abi3.so")
triton_status: LibraryStatus = (
    None if importlib.util.find_spec("triton") is not None else "triton is not installed"
)
_cuda_status: list[LibraryStatus] = []


def cuda_status() -> LibraryStatus:
    """Why the CUDA library cannot be used, or None; loads it on the first call, never at import."""
    if not _cuda_status:
        if torch.cuda.is_available():
            _cuda_status.append(_load("_C_cuda.so"))
        else:
            _cuda_status.append("torch finds no CUDA device")
    return _cuda_status[0]
