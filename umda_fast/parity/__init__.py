"""Every operation on every backend, held to the float64 reference by the rule of `umda_fast.parity.rule`."""

from collections.abc import Sequence
from typing import Any

import torch

from umda_fast.ops import backend_status
from umda_fast.ops._dispatch import reasons_against
from umda_fast.parity.case import Case, Outputs, dtype_name, exact_inputs
from umda_fast.parity.cases import all_cases
from umda_fast.parity.rule import (
    GRADIENT_FACTOR,
    OUTPUT_FACTOR,
    allowed_error,
    assert_close,
    error_of,
)

__all__ = ["DTYPES", "GRADIENT_FACTOR", "OUTPUT_FACTOR", "allowed_error", "assert_close", "error_of", "run_parity"]

NATIVE = ("cpp", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_parity(
    device: str = "cpu",
    *,
    backends: Sequence[str] = NATIVE,
    cases: Sequence[Case] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> dict[str, Any]:
    """Run every operation x backend x dtype x shape, forward and backward.

    The reference in the dtype under test is the composition whose error sets what is allowed, so it has no rows of
    its own; its truth is the float64 reference, which the tests hold to finite differences.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        backends: native backends to judge.
        cases: what to run; None for the table of `umda_fast.parity.cases`.
        dtypes: storage dtypes.

    Returns:
        ``rows``: per case one mapping for the outputs and one for the gradients, with ``op``, ``backend``,
        ``dtype``, ``shape``, ``pass`` (forward or backward), ``tensor`` (the one nearest to its limit), ``error``,
        ``allowed``, ``verdict``: ``pass``, ``fail``, or ``unavailable: ...`` where a backend cannot serve an operation
        (then once for all of its shapes, error and allowed None), and ``detail``: what a case raised, else empty.
        ``passed``: no verdict is ``fail``; nothing need have been tested (`umda_fast.parity.check` asks that).
    """
    rows: list[dict[str, Any]] = []
    known = all_cases() if cases is None else cases
    status = backend_status()
    kind = torch.device(device).type
    for backend in backends:
        if status[backend] is not None:
            rows.append(_row("every", backend, "-", "-", "-", "-", None, None, f"unavailable: {status[backend]}"))
            continue
        told = set()
        for case in known:
            reasons = reasons_against(case.op, backend, kind, torch.float32)
            if not reasons:
                for dtype in dtypes if case.storage else (torch.float32,):
                    rows += _judged(case, backend, dtype, device)
            elif case.op not in told:
                told.add(case.op)
                rows.append(
                    _row(case.op, backend, "-", "-", "-", "-", None, None, f"unavailable: {'; '.join(reasons)}")
                )
    return {"device": device, "rows": rows, "passed": all(row["verdict"] != "fail" for row in rows)}


def _judged(case: Case, backend: str, dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """`judge`, where a case that raises has failed."""
    try:
        return judge(case, backend, dtype, device)
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        return [_row(case.op, backend, dtype_name(dtype), case.shape, "-", "-", None, None, "fail", said)]


def judge(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> list[dict[str, Any]]:
    """Rows of one case: its outputs, and its gradients where it has any."""
    inputs = case.rounded(dtype, device)
    exact = case.evaluate(exact_inputs(inputs), "reference")
    composed = case.evaluate(inputs, "composition")
    found = case.evaluate(inputs, backend)
    rows = []
    for part, factor, index in (("forward", OUTPUT_FACTOR, 0), ("backward", GRADIENT_FACTOR, 1)):
        if exact[index]:
            worst = _worst(found[index], exact[index], composed[index], factor)
            verdict = "pass" if worst[1] <= worst[2] else "fail"
            rows.append(_row(case.op, backend, dtype_name(dtype), case.shape, part, *worst, verdict))
    return rows


def _worst(found: Outputs, exact: Outputs, composed: Outputs, factor: float) -> tuple[str, float, float]:
    """Name, error and allowed error of the tensor that is nearest to its limit."""
    judged = [
        (name, error_of(y, exact[name]), allowed_error(exact[name], composed[name], y.dtype, factor))
        for name, y in found.items()
    ]
    return max(judged, key=lambda x: (x[1] > x[2], x[1] / x[2] if x[2] else 0.0))


def _row(
    op: str,
    backend: str,
    dtype: str,
    shape: str,
    part: str,
    tensor: str,
    error: float | None,
    allowed: float | None,
    verdict: str,
    detail: str = "",
) -> dict[str, Any]:
    return {
        "op": op,
        "backend": backend,
        "dtype": dtype,
        "shape": shape,
        "pass": part,
        "tensor": tensor,
        "error": error,
        "allowed": allowed,
        "verdict": verdict,
        "detail": detail,
    }
