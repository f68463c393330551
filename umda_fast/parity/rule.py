"""The rule of accuracy that every implementation is held to; nothing here is a tolerance picked by hand.

Against float64, on the same rounded inputs, a result may err at most twice as much as PyTorch's own composition in
the same precision does (a gradient three times), as in the tests of FlashAttention (Dao et al. 2022). Where that
composition happens to be exact there remain 4 units in the last place of the result's scale.
"""

import math

import torch
from torch import Tensor

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
ULPS = 4.0


def error_of(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; inf where one is NaN or infinite and the other is something else."""
    if actual.shape != exact.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    x, y = actual.detach().double(), exact.detach().double()
    same = (x == y) | (x.isnan() & y.isnan())  # inf - inf is NaN
    return float((x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0).max())


def allowed_error(exact: Tensor, composed: Tensor, dtype: torch.dtype, factor: float) -> float:
    """What a result of ``dtype`` may err: ``factor`` times the error of ``composed``, and a few ulp of the scale."""
    finite = exact.detach().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    theirs = error_of(composed, exact)
    # A composition that overflows excuses nothing.
    return factor * (theirs if math.isfinite(theirs) else 0.0) + ULPS * torch.finfo(dtype).eps * scale


def assert_close(name: str, actual: Tensor, exact: Tensor, composed: Tensor, factor: float = OUTPUT_FACTOR) -> None:
    """Raise AssertionError unless ``actual`` keeps the rule against the float64 result ``exact``.

    Args:
        name: what is compared, for the message.
        actual: what is judged; its dtype gives the ulp.
        exact: the float64 result from the same rounded inputs.
        composed: PyTorch's own composition in the storage dtype of ``actual``.
        factor: `OUTPUT_FACTOR` or `GRADIENT_FACTOR`.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    error, allowed = error_of(actual, exact), allowed_error(exact, composed, actual.dtype, factor)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
