"""Which implementation serves a call: ``auto | reference | cpp | triton | cuda``.

``auto`` takes the native kernel of the tensor's device where there is one for the dtype, and the reference
otherwise. A backend named explicitly serves the call or raises; it never falls back in silence. One exception, for the
process default only: what a backend has no kernel for and the reference composes from library calls (a matrix product,
a layer norm) is served by that composition. `backends_used` says so, and a ``strict`` default refuses it.

Native kernels have the derivative of first order that ``Tensor.backward`` asks for. Where a call is differentiated in
another way that is known when it is made (forward mode, and what `torch.func` differentiates: ``grad``, ``vjp``,
``jvp``, ``jacrev``, ``jacfwd``, ``hessian``), ``auto`` takes the reference, and a native backend raises.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from umda_fast.errors import BackendUnavailableError, DataError
from umda_fast.ops import _library
from umda_fast.ops._derivatives import beyond_backward

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
_ENVIRONMENT = "UMDA_FAST_BACKEND"

#: Native backends by device, in the order in which ``auto`` tries them.
_NATIVE = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
#: Operations whose reference plans on the host.
_READING = {"knn", "cross_view_tokens"}
#: Operations whose reference is library calls, as good as a kernel where the matrix product is all that counts.
_COMPOSED = {"norm_linear", "linear_residual"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEYS = {"cpp": ("cpu", "CPU"), "cuda": ("cuda", "CUDA")}


@dataclass
class _State:
    default: str = "auto"
    strict: bool = False


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise DataError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_state = _State(_check_name(os.environ.get(_ENVIRONMENT) or "auto", _ENVIRONMENT))
_used: dict[str, str] = {}


def set_backend(name: str, *, strict: bool = False) -> None:
    """Set the process default, used by every call that names no backend.

    Args:
        name: ``auto``, ``reference``, ``cpp``, ``triton`` or ``cuda``. It starts as the environment variable
            ``UMDA_FAST_BACKEND``, or ``auto``.
        strict: a native backend also refuses what it leaves to PyTorch's library calls.

    Raises:
        DataError: another name. (It is a ValueError.)
    """
    _state.default, _state.strict = _check_name(name, "backend"), strict


def get_backend() -> str:
    """The process default."""
    return _state.default


@contextmanager
def use_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Set the process default inside a ``with`` block. Raises as `set_backend` does."""
    before = _state.default, _state.strict
    set_backend(name, strict=strict)
    try:
        yield
    finally:
        _state.default, _state.strict = before


@contextmanager
def prefer_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """As `use_backend`, for a setting in which ``auto`` means that nothing was asked for: the process default, which
    `set_backend` or the environment variable may have chosen, then stays."""
    undecided = _check_name(name, "backend") == "auto"
    with use_backend(_state.default if undecided else name, strict=strict or (undecided and _state.strict)):
        yield


def _no_kernel(op: str, backend: str) -> str:
    return f"{op} has no {'Triton' if backend == 'triton' else _KEYS[backend][1]} kernel"


def reasons_against(op: str, backend: str, device: str, dtype: torch.dtype) -> list[str]:
    """Every reason why ``backend`` cannot serve operation ``op`` for such tensors; empty when it can."""
    if backend == "reference":
        return []
    reasons = []
    if backend == "triton":
        if not _library.has_triton(op):
            reasons.append(_no_kernel(op, backend))
        if _library.triton_status is not None:
            reasons.append(_library.triton_status)
        if device != "cuda" and not _library.TRITON_INTERPRETED:
            reasons.append(
                f"it serves CUDA tensors (any, if TRITON_INTERPRET=1 is set), these are on {device}"
            )
    else:
        wanted, key = _KEYS[backend]
        status = _library.cpp_status if backend == "cpp" else _library.cuda_status()
        if status is not None:
            reasons.append(status)
        elif not _library.has_kernel(op, key):
            reasons.append(_no_kernel(op, backend))
        if device != wanted:
            reasons.append(f"it serves {wanted} tensors, these are on {device}")
    if dtype.is_floating_point and dtype not in _DTYPES:  # a graph alone has no features
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        reasons.append(f"it serves {names}, these are {str(dtype).removeprefix('torch.')}")
    return reasons


# What is installed does not change while a graph is traced. This is what torch.compiler.assume_constant_result
# sets; calling it would import all of torch._dynamo, half of the time that `import umda_fast.ops` takes.
reasons_against._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _without_values(op: str, tensor: Tensor) -> bool:
    """Whether the reference cannot serve ``op``, for want of values that it reads."""
    if op in _READING and not torch.compiler.is_compiling() and isinstance(tensor, torch._subclasses.FakeTensor):
        return True
    return tensor.is_meta


def resolve(op: str, tensor: Tensor, backend: str | None, inputs: Sequence[Tensor | None] = ()) -> str:
    """The backend that serves operation ``op`` for ``tensor``'s device and dtype, and note that it did.

    Args:
        op: its name.
        tensor: an input whose device and dtype count.
        backend: a name; None is the process default.
        inputs: those that the operation has derivatives by.

    Returns:
        A backend, or ``meta``: the operation's schema, for tensors without values.

    Raises:
        DataError: an unknown name.
        BackendUnavailableError: a backend named explicitly (in the call, or as the process default) that
            cannot serve the call.
    """
    wanted = _state.default if backend is None else _check_name(backend, "backend")
    device, dtype = tensor.device.type, tensor.dtype
    beyond = beyond_backward(inputs)
    if wanted == "auto":
        chosen = "meta" if not beyond and _without_values(op, tensor) else "reference"
        for candidate in () if beyond else _NATIVE.get(device, ()):
            if not reasons_against(op, candidate, device, dtype):
                chosen = candidate
                break
    else:
        reasons = reasons_against(op, wanted, device, dtype)
        if beyond and wanted != "reference":
            reasons.append(
                "its kernels have no forward-mode derivative and none for torch.func.grad, vjp and jvp; "
                'backend="reference" has both'
            )
        if reasons:
            left = backend is None and not _state.strict and op in _COMPOSED
            if left and reasons == [_no_kernel(op, wanted)]:
                _used[op] = "composition"
                return "reference"
            raise BackendUnavailableError(f"backend {wanted!r} cannot serve {op}: {'; '.join(reasons)}")
        chosen = wanted
    _used[op] = chosen
    return chosen


def native(op: str, backend: str) -> str:
    """Name of the operation that ``backend`` registered for ``op``."""
    return f"{op}_triton" if backend == "triton" else op


def backends_used() -> dict[str, str]:
    """For every operation called so far in this process: the backend that served it last, or ``composition``."""
    return dict(sorted(_used.items()))


def backend_status() -> dict[str, str | None]:
    """For every backend: None when it can be used on this machine, else the reason why not."""
    triton = _library.triton_status
    if triton is None and not torch.cuda.is_available() and not _library.TRITON_INTERPRETED:
        triton = "torch finds no CUDA device"
    return {
        "reference": None,
        "cpp": _library.cpp_status,
        "triton": triton,
        "cuda": _library.cuda_status(),
    }
