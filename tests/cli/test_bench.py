"""``umda-fast bench`` and ``umda-fast tune``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import call
from tests.written import read_json
from umda_fast import ops
from umda_fast.bench.brief import OVER, brief
from umda_fast.bench.report import render
from umda_fast.heap import settle_heap


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = call(*arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, page = tmp_path / "bench.json", tmp_path / "deep" / "bench.html"
    command = ["bench", "--device", "cpu", "--quick", "--seconds", "600", "--ops", "combine_task_gradients"]
    code, out, err = run(capsys, *command, "--json", str(table), "--report", str(page))
    assert code == 0, err
    assert "parity: 1 of 1 operations pass" in out
    assert "combine_task_gradients" in out
    assert "% of the floor" in out
    assert err.startswith("time budget: 600 s (--seconds); what does not fit is left out and said\n")
    assert "machine: " in err
    result = read_json(table, "bench")
    for entry in result["timings"][0]["contenders"]:
        line = next(line for line in out.splitlines() if line.strip().startswith(entry["name"]))
        assert entry["status"] in line if entry["ratio"] is None else f"{entry['ratio']:.2f} x" in line
    assert out.splitlines()[-1].endswith("s of a budget of 600 s (--seconds)")
    assert result["run"]["heap"] == settle_heap()  # as a training has it
    assert {x["op"] for x in result["timings"]} == {"combine_task_gradients"}
    assert result["passed"]
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert "<h2>Aims</h2>" not in page.read_text()  # they are a GPU's
    assert "aims not measured" not in out
    for share in (0.99, 1.2):
        result["timings"][0]["contenders"][0]["share"] = share
        assert (OVER in brief(result)) == (OVER in render(result)) == (share > 1)
    gpu = {**result, "run": {**result["run"], "profile": "cuda"}}
    assert render(gpu).index("<h2>Aims</h2>") < render(gpu).index("<h2>Machine</h2>")
    assert "aims not measured" in brief(gpu)


def test_bench_times_nothing_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.combine_task_gradients

    def wrong(*args: Any, backend: str | None = None) -> torch.Tensor:
        return right(*args, backend=backend) + (0.0 if backend == "reference" else 1e-3)

    monkeypatch.setattr(ops, "combine_task_gradients", wrong)
    code, out, err = run(capsys, "bench", "--device", "cpu", "--quick", "--ops", "combine_task_gradients", "--quiet")
    assert code == 1
    assert err == ""
    assert "combine_task_gradients: fail" in out
    assert "of the floor" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--ops", "knn,attention"], "--ops: expected some of cross_view, "),
        (["bench", "--ops", ""], "--ops: expected some of cross_view, "),
        (["bench", "--device", "gpu"], "--device: expected cuda or cpu, got 'gpu'"),
        (["tune", "attention"], "KERNEL: expected cross_view or cross_view_tokens or knn, got 'attention'"),
        (["tune", "--dtype", "int8"], "--dtype: expected bfloat16 or float16 or float32, got 'int8'"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    [line] = err.strip().splitlines()
    assert line.startswith(f"umda-fast: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
@pytest.mark.parametrize("arguments", [["tune"], ["bench", "--device", "cuda"]])
def test_without_a_gpu(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    [line] = err.strip().splitlines()
    assert "torch finds no CUDA device" in line


def test_tune_lists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is pinned, and what somebody measured, with the file it came from."""
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("UMDA_FAST_TUNING", str(file))
    key = "knn cosine torch.bfloat16 d=64 kept=8"
    config = {"tile": {"BM": 32, "BN": 64, "BD": 64}, "num_warps": 4, "max_registers": None}
    file.write_text(json.dumps({"some GPU, triton 3.9.0": {key: config}}))
    code, out, _ = run(capsys, "tune", "knn", "--dry-run")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{key}: pinned BD=64 ")
    assert lines[1].strip() == "measured on some GPU, triton 3.9.0: BD=64 BM=32 BN=64, 4 warps"
    assert lines[2] == f"kept in {file}"
    file.write_text("[]")
    code, _, err = run(capsys, "tune", "knn", "--dry-run")
    assert code == 2
    assert str(file) in err
