"""The GPU suite on a CPU: the whole script runs, says what it must, and times nothing that is wrong."""

import json
import math
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.written import read_json
from umda_fast import ops
from umda_fast.bench import capture, gpu_suite
from umda_fast.bench.aims import AIMS, judge
from umda_fast.bench.measure import Clock, Contender, Timer, compare
from umda_fast.bench.processes import Here, Processes
from umda_fast.bench.sections import STEP, Task
from umda_fast.bench.step_ledger import EAGER
from umda_fast.bench.training_step import COMPOSED, COMPOSED_COMPILED, EXACT, OURS_COMPILED
from umda_fast.bench.workloads import COMPILED, FLASH, FLEX, OURS, SDPA, WORKLOADS, Place
from umda_fast.ops._dispatch import reasons_against
from umda_fast.parity.cases import all_cases, neighbor_cases

CPU = torch.device("cpu")
#: Plenty: on a busy machine nothing may be left out.
SECONDS = 3000.0

Result = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run of everything, as the command leaves it."""
    folder = tmp_path_factory.mktemp("suite")
    code = gpu_suite.main(["--device", "cpu", "--quick", "--seconds", str(SECONDS), "--out", str(folder)])
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def result(written: Path) -> Result:
    return read_json(written / "gpu_suite.json", "bench")


def test_every_operation_is_checked_and_timed(result: Result) -> None:
    known = {case.op for case in all_cases()}
    assert known <= set(WORKLOADS), "an operation without a workload"
    assert set(result["parity"]) == known
    compiled = {op for op in known if not reasons_against(op, "cpp", "cpu", torch.float32)}
    for op, verdict in result["parity"].items():
        assert verdict == "pass" if op in compiled else verdict.startswith("no native kernel: cpp: "), op
    for op in known:
        timings = [x for x in result["timings"] if x["op"] == op]
        assert len({x["shape"] for x in timings}) == 3, op
        differentiable = any(case.gradients for case in all_cases() if case.op == op)
        assert {x["pass"] for x in timings} == ({"forward", "backward"} if differentiable else {"forward"}), op
        assert {x["backend"] for x in timings} == {"cpp" if op in compiled else "reference"}, op
    assert result["backends"] == {"cpp": None}
    assert result["passed"]
    assert {text for text in result["notes"] if "nothing checks it" not in text} == set()


@pytest.mark.parametrize("op", sorted(WORKLOADS))
def test_what_is_timed_is_checked_at_those_widths(op: str) -> None:
    """A kernel takes another path for whole vectors, more tasks or wider heads than for the odd widths of parity."""
    flat = {"task_gradient_statistics", "combine_task_gradients"}  # [tasks, columns]: any number of columns
    timed = {size[1:] if isinstance(size, tuple) else () for size in WORKLOADS[op].cuda}
    for rest in timed:
        problem = WORKLOADS[op].make((32, *rest) if rest else 32, Place(CPU, torch.float32))
        leaves = [x for x in problem.leaves if x.is_floating_point()]
        wanted = {x.shape[0] if op in flat else x.shape[-1] for x in leaves}
        found = [
            {x.shape[0] if op in flat else x.shape[-1] for x in case.inputs.values() if x.is_floating_point()}
            for case in all_cases()
            if case.op == op
        ]
        assert any(wanted <= widths for widths in found), (op, rest, wanted)


def test_segments_of_tokens_fill_more_than_a_tile() -> None:
    lengths = [case.inputs["cu_tokens"].diff() for case in all_cases() if case.op == "cross_view_tokens"]
    assert sum(len(x) > 0 and int(x.min()) >= 300 for x in lengths) >= 2


def test_floors_and_figures(result: Result) -> None:
    rates = result["rates"]
    assert all(rates[name] > 0 for name in ("copy", "bfloat16", "tf32", "float32"))
    for timing in result["timings"]:
        floor = timing["floor"]
        assert floor["bytes"] > 0
        least = max(floor["bytes"] / rates["copy"], floor["flops"] / rates[floor["unit"]])
        assert floor["seconds"] == pytest.approx(least)
        ours = timing["contenders"][0]
        assert ours["name"] == OURS
        assert ours["ratio"] == 1.0
        for entry in timing["contenders"]:
            if entry["status"] != "timed":
                assert entry["status"] == "missing", (timing["op"], entry)
                assert entry["detail"]
                continue
            seconds = entry["seconds"]
            repetitions = seconds["repetitions"]
            assert len(repetitions) >= 2
            assert min(repetitions) == seconds["min"] <= seconds["q10"] <= seconds["median"] <= seconds["q90"]
            assert entry["share"] == pytest.approx(least / seconds["median"])
            assert math.isfinite(entry["ratio"])
            assert entry["ratio"] > 0
            assert entry["rate"] > 0
            assert entry["rate_unit"] in ("GB/s", "TFLOP/s")


def test_rivals(result: Result) -> None:
    """What the suite was asked to compare with is there; what is missing says why."""
    names: dict[str, set[str]] = {}
    for timing in result["timings"]:
        names.setdefault(timing["op"], set()).update(x["name"] for x in timing["contenders"])
    assert {"eager reference", COMPILED, SDPA} <= names["cross_view"]
    assert {"eager reference", FLASH, FLEX} <= names["cross_view_tokens"]
    assert "chunked matmul + topk" in names["knn"]
    assert {"torch_geometric", "sparse CSR matrix product", COMPILED} <= names["neighbor_sum"]
    assert {"torch_geometric", COMPILED} <= names["neighbor_attention"]
    assert {"torch_geometric softmax + scatter", COMPILED} <= names["bag_pool"]
    assert {"stack + matmul", "torchjd IMTLG, combination included"} <= names["task_gradient_statistics"]
    last = [x for x in result["timings"] if x["op"] == "cross_view"][-1]
    assert next(x for x in last["contenders"] if x["name"] == COMPILED)["status"] == "timed"


def test_the_training_step_is_counted(written: Path, result: Result) -> None:
    ours, eager = result["ledger"]
    assert (ours["contender"], eager["contender"]) == (OURS, EAGER)
    assert ours["total"]["calls"] < eager["total"]["calls"]
    assert [row["hardware"] for row in ours["predicted"]] == ["this cpu", "H200", "A100 80 GB"]
    here = ours["hardware"][0]
    assert (here["copy"], here["products"]["32-true"]) == (result["rates"]["copy"], result["rates"]["float32"])
    page = (written / "gpu_suite.html").read_text()
    assert page.count("<circle") > 6 * 20
    assert "predicted for H200" in page


def test_the_training_step(result: Result) -> None:
    *plain, last = result["steps"]
    assert [x["instances"] for x in plain] == [32, 64]
    for step in plain:
        timed = {x["name"] for x in step["contenders"] if x["status"] == "timed"}
        assert timed == {OURS, EXACT, COMPOSED}
    timed = {x["name"] for x in last["contenders"] if x["status"] == "timed"}
    assert timed == {OURS, OURS_COMPILED, COMPOSED, COMPOSED_COMPILED}
    assert all(x["ratio"] > 0 for x in last["contenders"])
    assert last["resident_bytes"] > 0
    assert result["largest"]["finite"] is True


def test_capture_is_rehearsed(result: Result) -> None:
    assert {x["op"] for x in result["capture"]} == {x for x, text in result["parity"].items() if text == "pass"}
    assert {x["verdict"] for x in result["capture"]} == {"pass"}


def test_aims_are_for_gpus(result: Result) -> None:
    assert len(result["aims"]) == len(AIMS)
    assert {x["verdict"] for x in result["aims"]} == {"not measured"}


class _Page(HTMLParser):
    """Checks that tags close in order, and collects text and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_file(written: Path, result: Result) -> None:
    page = (written / "gpu_suite.html").read_text()
    parsed = _Page()
    parsed.feed(page)
    assert parsed.open == []
    assert parsed.links == []
    assert not re.search(r"url\(|@import|https?://", page)
    assert page.count("aria-label='share of the floor by contender'") == len(result["timings"])
    for op in result["parity"]:
        assert op in parsed.text
    assert "Everything passed." in parsed.text


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rest goes on, the exit code is 1, and no training step is timed with it."""
    right = ops.bag_attention_pool

    def wrong(*args: Any, backend: str | None = None) -> Any:
        out = right(*args, backend=backend)
        return out if backend == "reference" else out._replace(pooled=out.pooled * 1.01)

    monkeypatch.setattr(ops, "bag_attention_pool", wrong)
    command = ["--device", "cpu", "--quick", "--seconds", str(SECONDS), "--out", str(tmp_path)]
    assert gpu_suite.main([*command, "--ops", f"bag_pool,combine_task_gradients,{STEP}"]) == 1
    result = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert not result["passed"]
    assert [op for op, verdict in result["parity"].items() if verdict == "fail"] == ["bag_pool"]
    assert {x["op"] for x in result["timings"]} == {"combine_task_gradients"}
    assert result["steps"] == []
    assert "bag_pool: not timed, it is not known to be right on this device" in result["notes"]
    assert f"{STEP}: not timed, these are not known to be right: bag_pool" in result["notes"]
    assert "bag_pool" not in {x["op"] for x in result["capture"]}
    page = (tmp_path / "gpu_suite.html").read_text()
    assert "Everything passed." not in page
    assert page.count("<td>bag_pool</td>") > 1  # the failed rows themselves


def test_what_breaks_is_a_line() -> None:
    """Out of memory, an error, no time: records; the others are timed all the same."""

    def overflow(state: Any) -> None:
        raise torch.OutOfMemoryError("too much\nof it")

    calls = []

    def late(state: Any) -> None:
        calls.append(state)
        if len(calls) > 3:
            raise RuntimeError("later")

    contenders = [
        Contender("fine", lambda x: x + 1, lambda: 1),
        Contender("large", overflow),
        Contender("slow", lambda x: pytest.fail("was called")),
        Contender("late", late),
    ]
    records = compare(contenders, Timer(CPU), Clock(20.0), rounds=(4, 4), expected={"slow": 10.0})
    assert [x["name"] for x in records] == ["fine", "large", "slow", "late"]
    assert [x["status"] for x in records] == ["timed", "out of memory", "skipped", "failed"]
    assert records[1]["detail"] == "too much"
    assert "time budget" in records[2]["detail"]
    assert "RuntimeError: later" in records[3]["detail"]
    assert len(records[0]["seconds"]["repetitions"]) == 4
    assert all(x["seconds"] is None for x in records[1:])


def test_without_time_the_least_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many repetitions as are asked for at least, but not if they take long."""
    contenders = [Contender("it", lambda x: None)]
    [record] = compare(contenders, Timer(CPU), Clock(0.0), rounds=(5, 9))
    assert len(record["seconds"]["repetitions"]) == 5
    monkeypatch.setattr("umda_fast.bench.measure.PATIENCE", 0.0)
    [record] = compare(contenders, Timer(CPU), Clock(0.0), rounds=(5, 9))
    assert len(record["seconds"]["repetitions"]) == 1


def test_ours_that_raises_while_it_is_timed_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity is of small shapes. Whatever raises first, the call outside the clock or the one inside."""
    right = ops.combine_task_gradients
    for limit, shown in ((500, 3), (5_000, 2)):
        calls = []

        def fragile(ema: torch.Tensor, *args: Any, limit: int = limit, calls: list[int] = calls, **options: Any) -> Any:
            calls.append(ema.shape[1])
            if ema.shape[1] == 1_000 and (limit > 1_000 or calls.count(1_000) > 1):
                raise RuntimeError("an illegal memory access")
            return right(ema, *args, **options)

        monkeypatch.setattr(ops, "combine_task_gradients", fragile)
        result = gpu_suite.run(
            "cpu", quick=True, only=["combine_task_gradients"], seconds=SECONDS, say=lambda text: None
        )
        assert not result["passed"]
        [text] = result["broken"]
        assert "RuntimeError: an illegal memory access" in text
        assert len(result["timings"]) == shown
        assert "illegal memory access" in gpu_suite.brief(result)


def test_a_backend_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a run on a machine where the library does not load would measure the reference, and say that all is well."""
    monkeypatch.setattr("umda_fast.ops._library.cpp_status", "does not load")
    result = gpu_suite.run("cpu", quick=True, only=["bag_pool"], seconds=SECONDS, say=lambda text: None)
    assert not result["passed"]
    assert "backend cpp: does not load" in result["notes"]
    assert result["parity"] == {"bag_pool": "no native kernel: cpp: does not load"}
    assert {x["backend"] for x in result["timings"]} == {"reference"}


def test_a_spent_budget_is_said() -> None:
    result = gpu_suite.run("cpu", quick=True, only=["bag_pool"], seconds=0.0, say=lambda text: None)
    assert any("time budget of 0 s is spent" in text for text in result["notes"])
    assert result["parity"] == {"bag_pool": "pass"}


def test_a_crash_takes_nothing_with_it() -> None:
    """Sections in processes of their own: one that dies, one that is fine."""
    tasks = [
        Task("parity", "cpu", "quick", SECONDS, ["no such operation", "combine_task_gradients"]),
        Task("nothing", "cpu", "quick", SECONDS),
    ]
    (_, records, problem), (_, none, crash) = Processes()(tasks)
    assert problem is None
    assert {x["value"]["verdict"] for x in records} == {"pass"}
    assert none == []
    assert crash is not None
    assert crash.startswith("crashed: exit code 1: KeyError: 'nothing'")


#: A program in the place of the suite's: writes what it runs, then crashes, sleeps for ever beside a child, or ends.
STRANGE = """
import json, subprocess, sys
section = json.load(open(sys.argv[1]))["section"]
with open(sys.argv[2], "a") as answer:
    print(json.dumps({"kind": "note", "value": section}), file=answer, flush=True)
    with open(sys.argv[3], "a") as log:
        print(section, file=log, flush=True)
    if section == "sleeps":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
    if section == "crashes":
        sys.exit("fell over")
"""


def test_a_section_that_hangs_is_ended_once_and_keeps_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are given out as they end, a crash is tried again alone, and one that sleeps has had its time."""
    script, log, folder = tmp_path / "strange.py", tmp_path / "log", tmp_path / "sections"
    script.write_text(STRANGE.replace("sys.argv[3]", repr(str(log))))
    monkeypatch.setattr("umda_fast.bench.processes.GRACE", 5.0)
    tasks = [Task(section, "cpu", "quick", 0.0) for section in ("sleeps", "crashes", "ends")]
    begin = time.monotonic()
    found = {}
    for task, records, problem in Processes(3, folder, (sys.executable, str(script)))(tasks):
        found[task.section] = (records, problem, time.monotonic() - begin)
    note = [[{"kind": "note", "value": name}] for name in ("ends", "sleeps", "crashes")]
    assert [records for records, _, _ in found.values()] == note
    assert found["ends"][1] is None
    assert found["ends"][2] < 5
    assert found["sleeps"][1] == "crashed: did not end within 5 s"
    assert found["crashes"][1] == "crashed: exit code 1: fell over"
    assert sorted(log.read_text().split()) == ["crashes", "crashes", "ends", "sleeps"]
    assert {path.stem for path in folder.iterdir()} == {"sleeps", "crashes", "ends"}
    assert json.loads((folder / "sleeps.jsonl").read_text()) == note[1][0]


def test_parity_of_one_dtype() -> None:
    """As a GPU runs it, where kernels are compiled in every process."""
    task = Task("parity", "cpu", "quick", SECONDS, ["cross_view", "graph_transpose"], dtypes=["bfloat16"])
    [(_, records, problem)] = Here()([task])
    assert problem is None
    assert {(x["value"]["op"], x["value"]["dtype"]) for x in records} == {("cross_view", "bfloat16")}
    task.dtypes = ["float32"]
    assert {x["value"]["op"] for x in next(iter(Here()([task])))[1]} == {"cross_view", "graph_transpose"}


def test_capture_sees_what_changes() -> None:
    """A result that is not the same twice, and one that is wrong only when replayed."""
    [case] = [x for x in neighbor_cases("", 6, 2, 1, 8, csr=False) if x.op == "neighbor_sum"]

    class Forgetful(capture.Recorder):
        def record(self, run: Any) -> Any:
            _, results = super().record(run)
            return (lambda: None), results

    row = capture.check(case, "cpp", CPU, Forgetful())
    assert re.fullmatch(r"replay: .*\bsum\b.* differ", row["verdict"]), row

    class Baked(capture.Recorder):
        def record(self, run: Any) -> Any:
            _, results = super().record(run)
            first = {name: value.clone() for name, value in results.items()}
            return (lambda: [results[name].copy_(value) for name, value in first.items()]), results

    assert capture.check(case, "cpp", CPU, Baked())["verdict"].startswith("replay of other values: ")
    assert capture.check(case, "cpp", CPU, capture.Recorder())["verdict"] == "pass"


def made_up(profile: str) -> Result:
    """A result in which ours takes the floor's time and everybody else twice that."""
    rates = {"copy": 4e12, "bfloat16": 8e14, "tf32": 4e14, "float32": 5e13}

    def entry(name: str, seconds: float, peak: int = 1) -> Result:
        return {"name": name, "status": "timed", "detail": "", "seconds": {"median": seconds}, "peak_bytes": peak,
                "ratio": seconds, "share": 1 / seconds}  # fmt: skip

    def record(op: str, way: str, size: int, shape: str, rival: str) -> Result:
        return {"op": op, "pass": way, "dtype": "bfloat16", "shape": shape, "size": size, "floor": {"seconds": 1.0},
                "contenders": [entry(OURS, 1.0, 8 * 8 * size), entry(rival, 2.0)]}  # fmt: skip

    timings = []
    for way in ("forward", "backward"):
        timings.append(record("cross_view", way, 1_000_000, "", SDPA))
        timings += [record("cross_view_tokens", way, 4096, f"heads x {width}", FLASH) for width in (64, 128)]
        for op in ("bag_pool", "edge_cosine", "neighbor_attention", "neighbor_sum", "smoothness_energy"):
            timings.append(record(op, way, 10, "", "eager"))
    for op in ("task_gradient_statistics", "combine_task_gradients"):
        timings.append(record(op, "forward", 10, "", "eager"))
    for width in (64, 256):
        shape = f"n = 100,000, d = {width}, k = 8, cosine"
        timings.append(record("knn", "forward", 100_000, shape, "chunked matmul + topk"))
    rivals = [entry(name, 2.0, 100) for name in (EXACT, COMPOSED, COMPOSED_COMPILED)]
    steps = [{"instances": 1000, "resident_bytes": 100, "contenders": [entry(OURS, 0.25, 0), *rivals]}]
    largest = {"instances": 2_000_000, "status": "timed", "detail": "", "seconds": 9.0, "peak_bytes": 1, "finite": True}
    return {"run": {"profile": profile}, "rates": rates, "timings": timings, "steps": steps, "largest": largest}


def test_aims_are_judged() -> None:
    rows = {x["aim"]: x for x in judge(made_up("cuda"))}
    assert not [x for x in rows.values() if x["verdict"] == "not measured"]
    assert rows["cross_view forward, share of the copy rate, N >= 10^6"]["verdict"] == "met"
    assert rows[f"cross_view forward, times {SDPA}"]["verdict"] == "not met"
    assert rows["knn, n = 100k, d = 64, times chunked matmul + topk"]["value"] == 2.0
    assert rows["knn, memory: result over allocation"]["value"] == 1.0
    step = rows["training step, times the eager reference"]
    assert (step["value"], step["verdict"]) == (8.0, "met")
    assert rows["training step, memory of eager over ours"]["value"] == 2.0
    assert rows["one bag of 2,000,000 instances x 3 views trains"]["verdict"] == "met"
    empty = {**made_up("cuda"), "timings": [], "steps": [], "largest": None}
    assert {x["verdict"] for x in judge(empty)} == {"not measured"}
