"""The rule that all tests here use, and the report of `umda-fast parity`: both must see what is wrong."""

import json
import math
from dataclasses import replace

import pytest
import torch

from umda_fast.parity import OUTPUT_FACTOR, allowed_error, assert_close, error_of, run_parity
from umda_fast.parity.case import Inputs, Outputs
from umda_fast.parity.cases import all_cases, bag_pool_case
from umda_fast.parity.rule import ULPS

CASE = bag_pool_case("ragged", [3, 0, 9], 7, 2)


def test_the_whole_table_passes_and_can_be_written() -> None:
    report = run_parity("cpu")
    assert report["passed"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    judged = [row for row in report["rows"] if row["verdict"] == "pass"]
    cpp = {row["op"] for row in judged if row["backend"] == "cpp"}
    assert cpp == {case.op for case in all_cases()} - {"cross_view_tokens", "norm_linear", "linear_residual"}
    for dtype in ("float32", "bfloat16", "float16"):
        assert {row["pass"] for row in judged if row["dtype"] == dtype} == {"forward", "backward"}
    if not torch.cuda.is_available():
        told = {row["backend"]: row["verdict"] for row in report["rows"] if row["op"] == "every"}
        assert told["cuda"] == "unavailable: torch finds no CUDA device"


@pytest.mark.parametrize("wrong", ["value", "nan", "gradient"])
def test_a_wrong_kernel_fails(wrong: str) -> None:
    def run(x: Inputs, backend: str) -> Outputs:
        out = CASE.run(x, backend)
        if backend != "cpp":
            return out
        if wrong == "gradient":
            return {**out, "pooled": out["pooled"].detach() + 1.001 * (out["pooled"] - out["pooled"].detach())}
        return {**out, "entropy": out["entropy"] + (1e-4 if wrong == "value" else math.nan)}

    report = run_parity(backends=["cpp"], cases=[replace(CASE, run=run)], dtypes=[torch.float32])
    verdicts = {row["pass"]: row["verdict"] for row in report["rows"]}
    assert not report["passed"]
    assert verdicts["forward" if wrong != "gradient" else "backward"] == "fail"


def test_the_rule() -> None:
    exact = torch.tensor([1.0, -4.0, -math.inf, 0.0], dtype=torch.float64)
    composed = exact + torch.tensor([0.0, 0.25, 0.0, 0.125], dtype=torch.float64)
    floor = ULPS * torch.finfo(torch.float32).eps * 4
    assert error_of(composed, exact) == 0.25
    assert allowed_error(exact, composed, torch.float32, OUTPUT_FACTOR) == 0.5 + floor
    assert_close("within", exact + 0.5, exact, composed)
    with pytest.raises(AssertionError, match="beyond: error"):
        assert_close("beyond", exact + 0.6, exact, composed)


@pytest.mark.parametrize("found", [math.nan, math.inf, 0.0])
def test_what_is_infinite_must_be_so(found: float) -> None:
    exact = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    actual = torch.tensor([1.0, found])
    assert error_of(actual, exact) == math.inf
    # A composition that is as wrong excuses nothing.
    with pytest.raises(AssertionError):
        assert_close("infinite", actual, exact, actual)


def test_nothing_and_another_shape() -> None:
    nothing = torch.empty(0)
    assert_close("nothing", nothing, nothing.double(), nothing)
    assert error_of(torch.zeros(2), torch.zeros(3)) == math.inf
