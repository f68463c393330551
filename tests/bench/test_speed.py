"""``pytest bench``: it runs, it keeps what its users expect to be kept, and it times nothing that is wrong.

No time is judged here: what is compared with a run is that run with times that no machine has.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umda_fast.bench import training_step
from umda_fast.bench.sections import STEP
from umda_fast.bench.session import all_cases_of
from umda_fast.bench.workloads import COMPILED, FLEX, FLEX_LENGTH, OURS, WORKLOADS

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = ["bench", "--quick", "--device", "cpu", "-p", "no:cacheprovider"]
CPU = torch.device("cpu")
#: One operation at one size, of few cases of parity.
ONE = [*ARGUMENTS, "-k", "combine_task_gradients-100-"]


class Watch:
    """A plugin that may leave out benchmarks, and keeps how the others ended."""

    def __init__(self, wanted: Callable[[pytest.Item], bool] = lambda item: True) -> None:
        self.wanted = wanted
        self.items: list[Any] = []
        self.reports: list[pytest.TestReport] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = filter(self.wanted, items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def ended(self, outcome: str) -> list[pytest.TestReport]:
        return [report for report in self.reports if report.outcome == outcome and report.when == "call"]


pytestmark = pytest.mark.filterwarnings("ignore:Not saving anything")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the root, and as if no other pytest ran around it."""
    monkeypatch.chdir(ROOT)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)


def bench(*arguments: str, watch: Watch | None = None) -> int:
    """Exit code of a pytest in this process."""
    return int(pytest.main(list(arguments), plugins=[watch or Watch()]))


def is_quick(item: Any) -> bool:
    """The smallest size; without what compiles or is slow to import, which other tests run."""
    asked = item.callspec.params
    smallest = training_step.SIZES["quick"][0] if asked["op"] == STEP else WORKLOADS[asked["op"]].quick[0]
    late = any(name in asked["contender"] for name in ("compile", "torch_geometric", "torchjd"))
    return asked["size"] == smallest and not late


def test_every_benchmark_runs() -> None:
    """Every operation and the step, once each, after parity, not timed."""
    watch = Watch(is_quick)
    assert bench(*ARGUMENTS, "--benchmark-disable", watch=watch) == 0
    assert {item.callspec.params["op"] for item in watch.items} == {*WORKLOADS, STEP}
    passed = [report.nodeid for report in watch.ended("passed")]
    assert f"bench/test_speed.py::test_speed[cross_view-32-backward-{OURS}]" in passed
    assert len(passed) + len(watch.ended("skipped")) == len(watch.items)
    assert not watch.ended("failed")
    assert {r.longrepr[2] for r in watch.ended("skipped")} == {  # type: ignore[index]
        f"Skipped: compiled for {FLEX_LENGTH:,} tokens on CUDA devices only"
    }


@pytest.mark.parametrize("profile", ["quick", "cpu", "cuda"])
def test_cases(profile: str) -> None:
    """Sizes are those of the workloads; what compiles does so at one."""
    cases = all_cases_of(profile)
    assert len(set(cases)) == len(cases)
    for op, workload in WORKLOADS.items():
        own = [case for case in cases if case.op == op]
        sizes = getattr(workload, profile)
        assert [*dict.fromkeys(case.size for case in own)] == [*sizes]
        assert {case.size for case in own if case.contender == COMPILED} <= {sizes[workload.compiled_size]}
        assert {case.contender for case in own} > {OURS}
    assert {case.op for case in cases if case.contender == FLEX} == {"cross_view_tokens"}
    steps = [case for case in cases if case.op == STEP]
    assert {case.size for case in steps} == {*training_step.SIZES[profile]}
    assert {case.contender for case in steps} == {*training_step.trainees(training_step.make_model(CPU, 8, True), None)}


def test_what_a_run_keeps(tmp_path: Path) -> None:
    """JSON with what a figure means, a saved run, and a comparison with it that fails beyond what is allowed."""
    kept, store = tmp_path / "run.json", f"--benchmark-storage={tmp_path / 'store'}"
    short = ["--benchmark-only", "--benchmark-min-rounds=2", "--benchmark-max-time=0.001"]
    watch = Watch()
    assert bench(*ONE, *short, store, f"--benchmark-json={kept}", "--benchmark-autosave", watch=watch) == 0
    benchmarks = json.loads(kept.read_text())["benchmarks"]
    assert len(benchmarks) == len(watch.ended("passed")) == 3
    assert len({x["group"] for x in benchmarks}) == 1
    assert benchmarks[0]["group"].startswith("combine_task_gradients forward, T = 8, P = 100")
    for entry in benchmarks:
        extra = entry["extra_info"]
        assert entry["stats"]["rounds"] >= 2
        assert extra["bytes"] == 4 * (8 * 100 + 100)
        assert extra["floor_seconds"] == pytest.approx(extra["bytes"] / extra["rates"]["copy"])
        assert extra["share"] == pytest.approx(extra["floor_seconds"] / entry["stats"]["median"])
        assert extra["backend"] == ("cpp" if entry["params"]["contender"] == OURS else None)
        assert {"device", "threads", "heap", "load", "clocks", "flops", "dtype", "pass", "rate"} <= set(extra)

    (saved,) = (tmp_path / "store").rglob("0001_*.json")
    content = json.loads(saved.read_text())

    def compared(seconds: float, run: Callable[[list[str]], int]) -> int:
        """With that run, as if all of it had taken so long."""
        for entry in content["benchmarks"]:
            entry["stats"] |= dict.fromkeys(("min", "max", "mean", "median", "q1", "q3"), seconds)
        saved.write_text(json.dumps(content))
        return run([*ONE, *short, store, "--benchmark-compare", "--benchmark-compare-fail=median:50%"])

    assert compared(1e6, lambda arguments: bench(*arguments)) == 0

    def apart(arguments: list[str]) -> int:  # pytest-benchmark ends the process by an exception
        command = [sys.executable, "-m", "pytest", *arguments]
        result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert "Performance has regressed" in result.stderr
        assert f"test_speed[combine_task_gradients-100-forward-{OURS}] (000" in result.stdout
        return result.returncode

    assert compared(1e-12, apart) != 0


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each benchmark of the operation fails, with one line, and none of them has a figure."""
    monkeypatch.setattr("umda_fast.parity.allowed_error", lambda *values: -1.0)
    kept, watch = tmp_path / "run.json", Watch()
    assert bench(*ONE, "--benchmark-only", f"--benchmark-json={kept}", watch=watch) == 1
    failed = watch.ended("failed")
    assert len(failed) == len(watch.items) == 3
    for report in failed:
        (line,) = str(report.longrepr).splitlines()
        assert line.startswith("combine_task_gradients is wrong on cpu and is not timed: cpp, float32, ")
        assert line.endswith("allowed -1")
    assert not kept.exists()


def test_an_operation_that_nothing_checks_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.session

    monkeypatch.setattr(bench.session, "all_cases", list)
    watch = Watch()
    assert int(pytest.main([*ONE, "--benchmark-disable"], plugins=[watch])) == 1
    assert {str(x.longrepr) for x in watch.ended("failed")} == {
        "combine_task_gradients: no case of parity checks it; it is not timed"
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["-p", "no:benchmark"], "pytest bench: pytest-benchmark is not there; the extra dev brings it"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench(*ARGUMENTS, *arguments) == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {said}" in capfd.readouterr().err.splitlines()


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench("bench", "--device", "cuda") == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --device cuda: torch finds no CUDA device" in capfd.readouterr().err.splitlines()


def test_a_plain_pytest_collects_no_benchmarks() -> None:
    """At the root it finds what is in tests/, of which one file is enough here."""

    class Quick(Watch):
        def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
            others = collection_path.suffix == ".py" and collection_path.name not in ("test_heap.py", "test_speed.py")
            return others or collection_path == Path(__file__) or None

    watch = Quick()
    assert bench("--collect-only", "-q", "-p", "no:cacheprovider", watch=watch) == 0
    assert {item.nodeid.split("::")[0] for item in watch.items} == {"tests/test_heap.py"}
