"""A profile of steps: phases, attribution, what the rows add up to, files."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from umda_fast.blocks import Place, block
from umda_fast.errors import DataError
from umda_fast.ops import _library, bag_attention_pool
from umda_fast.profiling import RESULT, TRACE, WARMUP, StepProfile
from umda_fast.profiling.table import step_table
from umda_fast.profiling.timing import Time
from umda_fast.profiling.traffic import Count
from umda_fast.runtime.provenance import SCHEMAS

pytestmark = pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))

CPU = torch.device("cpu")
PTR = torch.tensor([0, 40, 100])


@dataclass
class Instances:
    num_instances: int
    x: torch.Tensor


def batches(count: int) -> Iterator[Instances]:
    for _ in range(count):
        yield Instances(100, torch.randn(100, 32))


def step(layer: nn.Linear, batch: Instances) -> None:
    with block("encoders"):
        z = layer(batch.x).tanh()
    with block("pooling"):
        pooled = bag_attention_pool(z, z[:, :2], PTR).pooled
    with block("SGL"):
        pooled.square().sum().backward()  # type: ignore[no-untyped-call]


def profiled(folder: Path, steps: int = 2, device: torch.device = CPU, more: int = 0) -> StepProfile:
    torch.manual_seed(0)
    layer = nn.Linear(32, 48)
    profile = StepProfile(steps, device, folder)
    with profile.whole():
        for batch in profile.steps(batches(profile.missing + more)):
            step(layer, batch)
    return profile


def test_every_figure_is_somewhere_and_rows_add_up(tmp_path: Path) -> None:
    result = profiled(tmp_path, more=3).save()
    assert result["steps"] == {"warmup": WARMUP, "timed": 2, "counted": 2}
    assert result["instances"] == {"warmup": WARMUP * 100, "timed": 200, "counted": 200}
    rows = {(row["block"], row["pass"]): row for row in result["blocks"]}
    expected = {("encoders", "forward"), ("encoders", "backward"), ("pooling", "forward"), ("pooling", "backward")}
    assert set(rows) == expected | {("data", "-"), ("SGL", "-"), ("rest", "-")}
    total = result["total"]
    for part in ("blocks", "operations"):
        for figure in ("calls", "bytes", "host_seconds", "floor_seconds"):
            assert sum(row[figure] for row in result[part]) == pytest.approx(total[figure]), (part, figure)
    # All of the time on the clock is somebody's.
    assert total["host_seconds"] == pytest.approx(result["seconds_per_step"], rel=1e-3)
    assert total["floor_seconds"] == pytest.approx(total["bytes"] / result["copy_bytes_per_second"])
    assert all(row["host_seconds"] > 0 for row in result["blocks"])
    operations = {row["operation"]: row for row in result["operations"]}
    assert operations["umda_fast::bag_pool"]["calls"] == operations["umda_fast::bag_pool_backward"]["calls"] == 1
    assert operations["umda_fast::bag_pool"]["host_seconds"] > 0
    assert operations["aten::randn"]["calls"] == 1  # data that is drawn is a part of the step
    encoders = rows["encoders", "forward"]
    product = 4 * (100 * 32 + 32 * 48 + 48 + 100 * 48)
    assert encoders["bytes"] == product + 4 * 2 * 100 * 48  # addmm and tanh
    assert encoders["share"] == pytest.approx(encoders["floor_seconds"] / encoders["host_seconds"])


def test_the_trace_has_the_ranges_of_the_timed_steps(tmp_path: Path) -> None:
    profiled(tmp_path, steps=2).save()
    assert {path.name for path in tmp_path.iterdir()} == {TRACE, RESULT}
    with gzip.open(tmp_path / TRACE, "rt") as stream:
        names = [event.get("name") for event in json.load(stream)["traceEvents"]]
    for name in ("umda_fast.step", "umda_fast.encoders", "umda_fast.pooling", "umda_fast.SGL", "umda_fast.data"):
        assert names.count(name) == 2, name
    assert "umda_fast::bag_pool" in names
    stamp = json.loads((tmp_path / RESULT).read_text())
    assert stamp["schema"] == {"name": "umda_fast.profile", "version": SCHEMAS["profile"]}


def test_without_steps_it_only_hands_out() -> None:
    profile = StepProfile(0, CPU, "nowhere")
    assert profile.missing == 0
    profile.check(0)
    assert len(list(profile.steps(batches(4)))) == 4
    assert isinstance(block("x"), contextlib.nullcontext)


def test_what_is_too_short() -> None:
    profile = StepProfile(2, CPU, "nowhere")
    profile.check(7)
    with pytest.raises(DataError, match=r"at least 7 updates \(3 warmup, 2 timed, 2 counted\), got 6"):
        profile.check(6)
    with profile.whole():
        for _ in profile.steps(batches(4)):  # ends while it is timed
            pass
    with pytest.raises(DataError, match="ended after 4 steps, 3 too early"):
        profile.result()
    with pytest.raises(DataError, match="got -1"):
        StepProfile(-1, CPU, "nowhere")


@pytest.mark.parametrize("at", [WARMUP, WARMUP + 2])  # while it is timed, and while it is counted
def test_an_error_ends_it(at: int, tmp_path: Path) -> None:
    profile = StepProfile(2, CPU, tmp_path)

    def training() -> None:
        with profile.whole():
            for number, _ in enumerate(profile.steps(batches(20))):
                if number == at:
                    raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        training()
    assert isinstance(block("x"), contextlib.nullcontext)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    with torch.profiler.profile():  # another can begin
        pass


def test_epochs_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    profile = StepProfile(2, CPU, tmp_path)
    layer = nn.Linear(32, 48)
    with profile.whole():
        for _ in range(3):
            for batch in profile.steps(batches(3)):
                step(layer, batch)
            with block("encoders"):  # validation, say: between epochs nothing is looked at
                layer(torch.randn(100, 32))
    rows = {(row["block"], row["pass"]): row for row in profile.result()["blocks"]}
    assert rows["encoders", "forward"]["calls"] == 2


def test_on_cuda_steps_with_nvtx_ranges_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be seen without one: the order, and that the device is waited for."""
    waited: list[Any] = []
    entered: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)

    @contextlib.contextmanager
    def ranges() -> Iterator[None]:
        entered.append("nvtx")
        yield

    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", ranges)
    profile = StepProfile(2, torch.device("cuda"), tmp_path)
    seen: list[str | None] = []
    for batch in profile.steps(batches(11)):
        seen.append(None if profile.phase is None else profile.phase.name)
        with block("encoders"):
            batch.x.sin()
    assert seen == ["warmup"] * WARMUP + ["timed"] * 2 + ["counted"] * 2 + ["marked"] * 2 + [None] * 2
    assert entered == ["nvtx"] * 2
    assert len(waited) == 2


def test_figures_of_a_table() -> None:
    encoders, back, step_ = Place("encoders", False), Place("encoders", True), Place("step", True)
    counts = {
        (encoders, "aten::mm"): Count(8, 4000),
        (back, "aten::mm"): Count(4, 8000),
        (step_, "aten::x"): Count(4, 0),
    }
    spent = {
        (encoders, "aten::mm"): Time(2.0, 1.0),
        (encoders, ""): Time(1.0, 0.0),
        (back, "aten::mm"): Time(4.0, 3.0),
        (step_, "aten::x"): Time(1.0, 0.0),
    }
    options: dict[str, Any] = {"timed_steps": 2, "counted_steps": 4, "scale": 1.5, "seconds": 8.0, "copy_rate": 1000.0}
    table = step_table(counts, spent, on_device=True, **options)
    first, second, rest = table["blocks"]
    assert (second["pass"], rest["block"], rest["pass"]) == ("backward", "rest", "-")
    seconds = {"host_seconds": 1.5, "device_seconds": 0.5, "floor_seconds": 1.5}
    assert first == {"block": "encoders", "pass": "forward", "calls": 2, "bytes": 1500, **seconds, "share": 3.0}
    assert rest["share"] is None  # no kernel ran
    assert table["seconds_per_step"] == 4.0
    on_host = step_table(counts, spent, on_device=False, **options)
    assert on_host["blocks"][0] == {**first, "device_seconds": None, "share": 1.0}
    assert [row["operation"] for row in on_host["operations"]] == ["aten::mm", "between operations", "aten::x"]
