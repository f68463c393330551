"""`umda-fast parity`: green only where something was tested, and all that was asked for."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.command_line import call
from tests.written import read_json
from umda_fast.ops import _library, set_backend
from umda_fast.parity.case import Case, Inputs, Outputs, Run
from umda_fast.parity.cases import bag_pool_case
from umda_fast.parity.layer_cases import norm_linear_case

POOL = bag_pool_case("ragged", [3, 0, 9], 7, 2)
LINEAR = norm_linear_case("small", 5, 2, 8, 4, 3)  # no kernel for the CPU


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """What is tested: two cases, of which the CPU has kernels for one."""
    found = [POOL, LINEAR]
    monkeypatch.setattr("umda_fast.parity.check.all_cases", lambda: found)
    return found


def wrong(x: Inputs, backend: str) -> Outputs:
    out = POOL.run(x, backend)
    return {**out, "pooled": out["pooled"] + 1.0} if backend == "cpp" else out


def raising(x: Inputs, backend: str) -> Outputs:
    if backend == "cpp":
        raise RuntimeError("an illegal address\nof [memory]")
    return POOL.run(x, backend)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("table")
def test_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("parity", "--device", "cpu", "--require", "cpp", "--junit", tmp_path / "p.xml", "--quiet") == 0
    [line] = said(capsys)
    assert line.startswith("parity on cpu: passed (cpp 6 of 6")
    suite = ET.parse(tmp_path / "p.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == (str(len(suite)), "0")
    names = {(case.get("classname"), case.get("name")) for case in suite if case.find("skipped") is None}
    assert len(names) == 6
    assert ("parity.cpp.bag_pool", "bfloat16 ragged backward cpu") in names
    assert call("parity", "--device", "cpu") == 0
    shown = "\n".join(said(capsys))
    assert "Parity with the float64 reference: 6 of" in shown


@pytest.mark.parametrize(("run", "words"), [(wrong, "pooled: error "), (raising, "RuntimeError: an illegal address")])
def test_a_failure_is_repeated_at_the_end(
    run: Run, words: str, table: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table[0] = replace(POOL, run=run)
    outputs = ["--json", tmp_path / "p.json", "--junit", tmp_path / "p.xml"]
    assert call("parity", "--device", "cpu", "--require", "cpp", *outputs) == 1
    *_, first, second, third, last = said(capsys)
    for line in (first, second, third):
        assert line.startswith("FAIL cpp bag_pool ")
        assert words in line
    assert last.startswith("parity on cpu: failed (cpp ")
    report = read_json(tmp_path / "p.json", "parity")
    assert (report["outcome"], report["passed"], report["failed"]["cpp"]) == ("failed", False, 3)
    suite = ET.parse(tmp_path / "p.xml").getroot()[0]
    assert suite.get("failures") == "3"
    assert sum(words in (case.findtext("failure") or "") for case in suite) == 3


def test_nothing_tested_is_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Case]) -> None:
    outputs = ["--json", tmp_path / "p.json", "--junit", tmp_path / "p.xml", "--quiet"]
    assert call("parity", "--device", "cpu", "--ops", "norm_linear", *outputs) == 3
    report = read_json(tmp_path / "p.json", "parity")
    assert (report["outcome"], report["passed"]) == ("nothing tested", False)
    assert ET.parse(tmp_path / "p.xml").getroot().get("failures") == "1"
    monkeypatch.setattr(_library, "cpp_status", "it was not built")
    monkeypatch.setattr(_library, "triton_status", "triton is not installed")
    assert call("parity", "--device", "cpu", "--quiet") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
@pytest.mark.usefixtures("table")
def test_what_is_required_must_have_been_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ["--json", tmp_path / "p.json", "--junit", tmp_path / "p.xml", "--quiet"]
    assert call("parity", "--require", "cpp,cuda", *outputs) == 3
    [line] = said(capsys)
    assert line.startswith("parity on cpu: not all that was required: cuda (cpp 6 of 6")
    assert read_json(tmp_path / "p.json", "parity")["missing"] == ["cuda"]
    suite = ET.parse(tmp_path / "p.xml").getroot()[0]
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["required: cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device cuda: torch finds no CUDA device"),
        (["--device", "gpu"], "--device: expected cpu or cuda, got 'gpu'"),
        (["--backend", "cuda"], "--backend cuda: tests nothing on cpu; unavailable: torch finds no CUDA device"),
        (["--backend", "cpp", "--ops", "norm_linear"], "--backend cpp: tests nothing on cpu; unavailable: norm_linear"),
        (["--backend", "c++"], "--backend: expected some of cpp, triton, cuda; got c++"),
        (["--require", "cpu"], "--require: expected some of cpp, triton, cuda; got cpu"),
        (["--ops", "bag_pool,pool"], "--ops: expected some of bag_pool, norm_linear; got pool"),
    ],
)
def test_what_is_named_must_be_there(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("parity", *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"umda-fast: {message}")


@pytest.mark.usefixtures("table")
def test_the_default_backend_is_the_one_that_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    """UMDA_FAST_BACKEND sets it."""
    try:
        set_backend("cpp")
        assert call("parity", "--device", "cpu", "--quiet") == 0
        assert said(capsys) == ["parity on cpu: passed (cpp 6 of 6 passed)"]
        assert call("parity", "--device", "cpu", "--ops", "norm_linear") == 2
        assert "umda-fast: UMDA_FAST_BACKEND cpp: tests nothing on cpu" in capsys.readouterr().err
        set_backend("reference")
        assert call("parity", "--device", "cpu") == 2
        assert "UMDA_FAST_BACKEND=reference" in capsys.readouterr().err
    finally:
        set_backend("auto")
