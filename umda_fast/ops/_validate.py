"""Checks that name the argument, what was expected and what came, before any kernel runs.

Shapes, dtypes and devices are checked on every call. Checks of *values* (an offset vector, a table of indices, a
mask) read the tensor, which on a GPU means one synchronisation; they run once per tensor and version and are
left out while ``torch.compile`` traces or a CUDA graph is captured.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Attribute of a tensor: check -> version of the tensor that passed it.
_PASSED = "_umda_fast_checked"

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(
    value: object,
    name: str,
    shape: Sequence[int | str] | None = None,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    like: Tensor | None = None,
    like_name: str = "",
) -> Tensor:
    """Check one tensor: its rank and sizes, dtype and device.

    Args:
        shape: a size, or a name for a size that is free, per dimension.
        dtype: what is allowed; ``None`` with ``like``: the dtype of ``like``.
        like: the tensor whose device (and dtype) must be shared, called ``like_name`` in the message.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another rank, size or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if shape is not None:
        wrong = value.dim() != len(shape) or any(
            isinstance(want, int) and got != want for got, want in zip(value.shape, shape, strict=True)
        )
        if wrong:
            wanted = ", ".join(str(size) for size in shape)
            raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    if dtype is None and like is not None:
        if value.dtype != like.dtype:
            raise TypeError(
                f"{name} must have the dtype of {like_name}, {_dtype_name(like.dtype)}, got {_dtype_name(value.dtype)}"
            )
    elif dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if value.dtype not in allowed:
            names = " or ".join(_dtype_name(d) for d in allowed)
            raise TypeError(f"{name} must be {names}, got {_dtype_name(value.dtype)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {value.device}")
    return value


def in_range(value: int, name: str, low: int, high: int | None = None) -> None:
    """Check a size or an integer argument. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def offsets(ptr: object, name: str, total: int, total_name: str, *, like: Tensor) -> Tensor:
    """Check an offset vector: int64 [B+1], from 0, never decreasing, to ``total``.

    Raises:
        TypeError, ValueError: naming the first offset that is wrong.
    """
    ptr = tensor(ptr, name, ["B+1"], dtype=torch.int64, like=like, like_name="the other inputs")
    if ptr.shape[0] < 1:
        raise ValueError(f"{name} must have shape [B+1], got [0]")

    def check(ptr: Tensor) -> None:
        first, last = int(ptr[0]), int(ptr[-1])
        if first != 0:
            raise ValueError(f"{name} must start at 0, got {first}")
        falls = (ptr[1:] < ptr[:-1]).nonzero()
        if falls.numel():
            b = int(falls[0, 0])
            raise ValueError(
                f"{name} must not decrease, got {name}[{b}] = {int(ptr[b])}, {name}[{b + 1}] = {int(ptr[b + 1])}"
            )
        if last != total:
            raise ValueError(f"{name} must end at {total_name} = {total}, got {last}")

    return _once(ptr, f"offsets to {total}", check)


def indices(index: Tensor, name: str, low: int, high: int) -> Tensor:
    """Check that every element of an integer tensor is in ``low..high - 1``. Raises ValueError."""

    def check(index: Tensor) -> None:
        wrong = ((index < low) | (index >= high)).nonzero()
        if wrong.numel():
            at = wrong[0].tolist()
            raise ValueError(
                f"{name} must be in {low}..{high - 1}, got {name}[{', '.join(map(str, at))}] = {int(index[*at])}"
            )

    return _once(index, f"indices {low}:{high}", check)


def views_present(mask: Tensor, name: str) -> Tensor:
    """Check that every instance of a bool mask [N, V] has at least one view. Raises ValueError."""

    def check(mask: Tensor) -> None:
        without = (~mask.any(1)).nonzero()
        if without.numel():
            raise ValueError(
                f"{name} must leave every instance at least one view, instance {int(without[0, 0])} has none"
            )

    return _once(mask, "views present", check)


def check_batch(ptr: Tensor, mask: Tensor) -> None:
    """Check a batch where it was made, so that no operation has to read it again, nor from a GPU.

    Args:
        ptr: int64 [B+1], offsets of the bags in N instances.
        mask: bool [N, V], views that are present.

    Raises:
        TypeError, ValueError: an offset that is wrong, or an instance without a view.
    """
    offsets(ptr, "ptr", mask.shape[0], "N", like=mask)
    views_present(mask, "mask")


def share_checks(source: Tensor, copy: Tensor) -> Tensor:
    """Tell that ``copy`` has the values of ``source``, on another device perhaps; returns ``copy``."""
    if copy is not source:
        passed = source.__dict__.get(_PASSED, {})
        still = [what for what, version in passed.items() if version == _version(source)]
        copy.__dict__[_PASSED] = dict.fromkeys(still, _version(copy))
    return copy


def capturing(value: Tensor) -> bool:
    """Whether what is done with ``value`` now is recorded into a CUDA graph."""
    return value.is_cuda and torch.cuda.is_current_stream_capturing()


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _once(value: Tensor, what: str, check: Callable[[Tensor], None]) -> Tensor:
    """Run a check that reads ``value``, unless it passed for this very tensor and version already."""
    if torch.compiler.is_compiling() or value.is_meta or isinstance(value, torch._subclasses.FakeTensor):
        return value  # it has no values, or none yet
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return value
    if capturing(value):
        return value
    passed: dict[str, int] = value.__dict__.setdefault(_PASSED, {})
    # An inference tensor keeps no version: a change in place would not be seen. On the CPU a second look is cheap.
    if passed.get(what) != _version(value) or (value.is_inference() and not value.is_cuda):
        check(value)
        passed[what] = _version(value)
    return value
