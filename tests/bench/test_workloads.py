"""Contenders compute the same thing; what is said to a GPU is spelt right."""

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from umda_fast.bench import capture, sections, workloads
from umda_fast.bench.measure import HOLD, Clock, Contender, CudaTimer, Timer, compare
from umda_fast.bench.sections import Task
from umda_fast.bench.sensors import Sensors, processor_clock, typical
from umda_fast.bench.training_step import chunked_graph
from umda_fast.bench.workloads import FLASH, OURS, WORKLOADS, Floor, Place, Workload
from umda_fast.ops import knn_graph
from umda_fast.parity.cases import bag_pool_case

CPU = torch.device("cpu")
#: Said to be something else: attention without statistics or gates, one combined gradient, random dropout.
OTHERWISE = {FLASH, "torchjd IMTLG, combination included"}
RANDOM = {"dropout_add_norm", "gelu_dropout", "linear_residual"}


def outputs(found: Any) -> list[Tensor]:
    return [found.detach()] if isinstance(found, Tensor) else [x.detach() for x in found]


@pytest.mark.parametrize("op", sorted(set(WORKLOADS) - RANDOM))
def test_contenders_agree(op: str) -> None:
    """On the first size, each on inputs of its own, for some write to them."""
    place, size = Place(CPU, torch.float32), WORKLOADS[op].quick[0]
    names = list(WORKLOADS[op].make(size, place).contenders)
    assert names[0] == OURS
    problem = WORKLOADS[op].make(size, place)
    wanted = outputs(problem.contenders[OURS](*problem.leaves))
    for name in names[1:]:
        if name not in OTHERWISE:
            problem = WORKLOADS[op].make(size, place)
            found = outputs(problem.contenders[name](*problem.leaves))
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}")


def test_flex_attention_has_the_right_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, which a CPU cannot do backward for; compared is the forward pass."""
    problem = WORKLOADS["cross_view_tokens"].make((32, 16), Place(CPU, torch.float32))
    q, k, v, gate = (x.detach() for x in problem.leaves)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    contender = workloads._flex(32, lambda x: x.view(1, 32, 2, 16).transpose(1, 2), 2)
    torch.testing.assert_close(contender(q, k, v, gate), problem.contenders[OURS](q, k, v, gate))


def test_the_chunked_graph_is_the_graph() -> None:
    x, ptr = torch.randn(50, 8), torch.tensor([0, 1, 1, 4, 50])
    graph, wanted = chunked_graph(x, ptr, 5), knn_graph(x, ptr, 5)
    assert torch.equal(graph.neighbors, wanted.neighbors)
    assert graph.similarity is not None
    assert wanted.similarity is not None
    torch.testing.assert_close(graph.similarity, wanted.similarity)
    small = workloads.chunked_topk(x, ptr, 5, rows=7)
    assert torch.equal(small[0], graph.neighbors)


def test_floors() -> None:
    rates = {"copy": 100.0, "bfloat16": 1000.0}
    assert Floor(200.0).seconds(rates) == 2.0
    assert Floor(200.0).rate(4.0, rates) == (50e-9, "GB/s")
    assert Floor(200.0, 5000.0).seconds(rates) == 5.0
    assert Floor(200.0, 5000.0).rate(10.0, rates) == (500e-12, "TFLOP/s")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[dict[str, mock.Mock]]:
    """torch.cuda, of which every name that is used must exist, doing nothing."""
    names = (
        "get_device_properties", "Event", "synchronize", "memory_allocated", "reset_peak_memory_stats",
        "max_memory_allocated", "empty_cache", "CUDAGraph", "graph", "Stream", "current_stream", "stream",
        "set_sync_debug_mode", "_sleep",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(mock.patch.object(torch.cuda, name)) for name in names}
        for name in ("graph", "stream"):
            found[name].return_value = contextlib.nullcontext()
        found["get_device_properties"].return_value = mock.Mock(L2_cache_size=1 << 10)
        found["Event"].return_value.elapsed_time.return_value = 2.0
        found["Event"].return_value.query.return_value = False
        found["memory_allocated"].return_value = 10
        found["max_memory_allocated"].return_value = 70
        yield found


def test_cuda_timer() -> None:
    with pretended_gpu() as cuda:
        [record] = compare([Contender("it", lambda x: None)], CudaTimer(CPU), Clock(1.0), rounds=(3, 3))
        cuda["Event"].assert_called_with(enable_timing=True)
    assert record["seconds"]["median"] == 0.002
    assert record["peak_bytes"] == 60
    assert record["late"] == 0


def test_the_stream_is_held_until_python_has_launched() -> None:
    """The hold comes before the first event, and grows with every call that it was too short for."""
    with pretended_gpu() as cuda:
        timer = CudaTimer(CPU)
        assert timer.cycles_per_second == (1 << 20) / 0.002
        calls = mock.Mock()
        calls.attach_mock(cuda["_sleep"], "sleep")
        calls.attach_mock(cuda["Event"].return_value.record, "record")
        timer(lambda state: calls.run(state), "it")
        cycles = int(5e-4 * timer.cycles_per_second)
        record = mock.call.record()
        assert calls.mock_calls == [mock.call.sleep(cycles), record, mock.call.run("it"), record]
        cuda["Event"].return_value.query.return_value = True  # the device has passed the first event: it waits
        [timed] = compare([Contender("it", lambda x: None)], timer, Clock(1.0), rounds=(9, 9))
        assert timed["late"] == 9
        assert timer.hold == HOLD[1]
        cuda["_sleep"].reset_mock()
        CudaTimer(CPU, held=False)(lambda state: None, None)
        cuda["_sleep"].assert_not_called()


NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char* uuid, void** handle) {
  *handle = (void*)7;
  return uuid[0] == 'G' && uuid[4] == 'a' ? 0 : 6;
}
int nvmlDeviceGetClockInfo(void* handle, int kind, unsigned* mhz) {
  *mhz = kind == 1 ? 1980 : 3201;
  return handle != (void*)7;
}
int nvmlDeviceGetPowerUsage(void* handle, unsigned* milliwatts) { *milliwatts = 650500; return 0; }
int nvmlDeviceGetTemperature(void* handle, int kind, unsigned* celsius) { return 3; }
"""


def test_sensors(tmp_path: Path) -> None:
    """Against a library with NVML's functions: one GPU, which does not tell its temperature."""
    (tmp_path / "nvml.c").write_text(NVML)
    library = str(tmp_path / "nvml.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "nvml.c")], check=True)
    with pretended_gpu() as cuda:
        cuda["get_device_properties"].return_value.uuid = "abc"
        reading = Sensors(CPU, library).read()
        assert reading == {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "watts": 650.5}
        assert typical([reading, {"sm_mhz": 1970.0}, {}]) == {**reading, "sm_mhz": 1975.0}
        cuda["get_device_properties"].return_value.uuid = "other"
        assert Sensors(CPU, library).read() == {}
        assert Sensors(CPU, "libnone.so").read() == {}
    assert typical([{}]) is None


def test_the_clock_of_a_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\ncpu MHz\t\t: 2400.5\n\nprocessor\t: 1\ncpu MHz\t\t: 3100.25\n")
    assert processor_clock(tmp_path / "cpuinfo") == {"cpu_mhz": 3100.25}
    (tmp_path / "other").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert processor_clock(tmp_path / "other") == {}
    assert processor_clock(tmp_path / "none") == {}


def test_what_compiles_at_its_first_call_is_timed_with_the_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention, which would take the time of the other contenders."""
    called: list[str] = []
    made = workloads.bag_pool(32, Place(CPU, torch.float32))

    def late(z: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        called.append("late")
        return made.contenders[OURS](z, scores)

    problem = replace(made, contenders={OURS: made.contenders[OURS]}, compiled=None, late={"late": late}, backward=None)
    monkeypatch.setitem(WORKLOADS, "bag_pool", Workload(lambda size, place: problem, (1, 2), (), (), compiled_size=0))
    task = Task("timing", "cpu", "quick", 100.0, ["bag_pool"], {"copy": 1e10, "float32": 1e10})
    records: list[dict[str, Any]] = []
    sections.time_operation("bag_pool", task, Timer(CPU), Clock(100.0), records.append)
    assert len(records) == 2
    assert not called
    sections.time_operation("bag_pool", task, Timer(CPU), Clock(100.0), records.append, compiling=True)
    assert len(records) == 3
    assert called
    assert [x["name"] for x in records[2]["value"]["contenders"]] == [OURS, "late"]


def test_cuda_recorder() -> None:
    """What it drives is called; the graph is replayed, not the function."""
    case = bag_pool_case("", [3, 2], 4, 2)
    with pretended_gpu() as cuda:
        row = capture.check(case, "cpp", CPU, capture.CudaRecorder())
        assert [call.args[0] for call in cuda["set_sync_debug_mode"].call_args_list] == ["error", "default"]
        cuda["CUDAGraph"].return_value.replay.assert_called_once()
        assert cuda["stream"].call_count == 2
    # Nothing was really recorded, and the check sees that.
    assert row["verdict"].startswith("replay: ")
