"""The ledger of a step: its budget, its floating-point operations by hand, what it predicts, its picture."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch

from bench import step_ledger
from bench.brief import brief
from bench.roofline import roofline
from bench.step_ledger import EAGER, GPUS, MODEL, PRECISIONS, RUN, Figures, Hardware, ledger, predicted
from bench.workloads import OURS
from tests.bench.step_budget import BUDGET, INSTANCES, spent_by
from umda_fast.blocks import BlockRecord, block, recording
from umda_fast.model import UMDAConfig
from umda_fast.ops import _library, knn_graph
from umda_fast.runtime.config import as_dict, make_config

compiled = pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))


@pytest.fixture(scope="module")
def ledgers() -> dict[tuple[str, str], dict[str, Any]]:
    return {(p, c): ledger(INSTANCES, p, c) for p in PRECISIONS for c in (OURS, EAGER)}


def test_the_configuration_is_the_default_one() -> None:
    """A default that changes changes what a step costs: write it into the ledger, and the budget anew."""
    names = {field.name for field in dataclasses.fields(UMDAConfig)} - {"views", "tasks", "metadata"}
    default = UMDAConfig(views=step_ledger.VIEWS, tasks=step_ledger.TASKS)
    assert {name: getattr(default, name) for name in names} == MODEL
    run = as_dict(make_config())
    assert {name: {key: run[name][key] for key in values} for name, values in RUN.items()} == RUN
    assert set(RUN["penalties"]) == set(run["penalties"])


@compiled
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_keeps_its_budget(ledgers: dict[tuple[str, str], dict[str, Any]], precision: str) -> None:
    """`python -m tests.bench.step_budget` writes a new one, where less is spent or more is worth it."""
    budget = json.loads(BUDGET.read_text())
    assert budget["instances"] == INSTANCES
    if budget["torch"].split(".")[:2] != torch.__version__.split(".")[:2]:
        pytest.skip(f"counted with torch {budget['torch']}, which composes some of its operations otherwise")
    found, allowed = spent_by(ledgers[precision, OURS]), budget[precision]
    over = {
        name: (figures, allowed["blocks"].get(name))
        for name, figures in found["blocks"].items()
        if any(figures[key] > allowed["blocks"].get(name, {key: 0})[key] for key in figures)
    }
    assert found["calls"] <= allowed["calls"], over
    assert found["bytes"] <= allowed["bytes"], over


@compiled
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ours_takes_less_than_eager(ledgers: dict[tuple[str, str], dict[str, Any]], precision: str) -> None:
    ours, eager = ledgers[precision, OURS]["total"], ledgers[precision, EAGER]["total"]
    assert ours["calls"] < eager["calls"]
    assert ours["bytes"] < eager["bytes"]
    own = [row["operation"] for row in ledgers[precision, EAGER]["operations"]]
    assert not [name for name in own if name.startswith("umda_fast::")]
    assert any(name.startswith("aten::native_dropout") or name == "aten::bernoulli_" for name in own)
    assert "umda_fast::dropout_add_norm" in [row["operation"] for row in ledgers[precision, OURS]["operations"]]


def test_rows_add_up(ledgers: dict[tuple[str, str], dict[str, Any]]) -> None:
    for one in ledgers.values():
        for rows in (one["blocks"], one["operations"]):
            assert {key: sum(row[key] for row in rows) for key in one["total"]} == one["total"]


def test_counting_changes_no_random_numbers_of_others() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    ledger(4, "32-true", OURS)
    assert torch.equal(torch.rand(4), expected)


def flops(run: Any) -> dict[str, int]:
    record = BlockRecord()
    traffic = step_ledger.StepTraffic(record)
    with recording(record), traffic, block("here"):
        run()
    return {name: count for (_, name), count in traffic.flops.items()}


def test_floating_point_operations() -> None:
    a, b = torch.ones(6, 4), torch.ones(4, 5)
    found = flops(lambda: (a @ b).add_(1.0).sum())
    assert found["aten::mm"] == 2 * 6 * 4 * 5
    assert found["aten::add_"] == 30
    assert found["aten::sum"] == 30
    assert flops(lambda: torch.ones(3, 1).expand(3, 7) * 2.0)["aten::mul"] == 21


@compiled
def test_floating_point_operations_of_the_graph() -> None:
    """All pairs of a bag, once, though never of two bags."""
    x, ptr = torch.randn(9, 4), torch.tensor([0, 4, 9])
    assert flops(lambda: knn_graph(x, ptr, 2, backend="cpp"))["umda_fast::knn"] == (4 * 4 + 5 * 5) * 4


def test_predicted_seconds() -> None:
    machine = Hardware("m", copy=100.0, products={"32-true": 10.0}, launch=0.5)
    operations = {"copy": Figures(2, 1_000, 10), "product": Figures(1, 100, 500)}
    found = predicted(operations, machine, "32-true")
    assert found == {"hardware": "m", "bytes": 11.0, "products": 51.0, "launches": 1.5, "step": 60.0}
    slow = dataclasses.replace(machine, launch=100.0)
    assert predicted(operations, slow, "32-true")["step"] == 300.0


def test_predictions_are_called_so(ledgers: dict[tuple[str, str], dict[str, Any]]) -> None:
    text = step_ledger.lines(list(ledgers.values()), operations=3)
    seconds = [line for line in text if re.search(r"\d ms\b", line)]
    assert len(seconds) == len(ledgers) * len(GPUS)
    assert all(line.strip().startswith("predicted on ") for line in seconds)


def test_the_picture(ledgers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """A dot for every operation that moves anything, the larger the more of the seconds, all inside the frame."""
    one = ledgers["32-true", OURS]
    [gpu, _] = one["hardware"]
    page = roofline([one], gpu)
    shown = [row for row in one["operations"] if row["bytes"] and row["flops"]]
    dots = re.findall(r"<circle cx='([\d.]+)' cy='([\d.]+)' r='([\d.]+)'", page)
    assert len(dots) == len(shown) > 20
    assert "predicted for H200" in page
    radii = [float(radius) for _, _, radius in dots]
    assert radii == sorted(radii, reverse=True)
    assert all(70 <= float(x) <= 490 and 34 <= float(y) <= 334 for x, y, _ in dots)
    cost = [max(row["bytes"] / gpu["copy"], row["flops"] / gpu["products"]["32-true"]) for row in shown]
    assert radii[0] == pytest.approx(2 + 26 * math.sqrt(max(cost) / sum(cost)), abs=0.06)
    # Products and bytes take equally long on the line, which is dashed.
    assert "stroke-dasharray" in page
    assert roofline([{**one, "operations": []}], gpu) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, "16-true", OURS), "precision: expected one of 32-true, bf16-mixed, got '16-true'"),
        ((4, "32-true", "theirs"), "contender: expected 'umda_fast' or "),
    ],
)
def test_mistakes(arguments: tuple[int, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ledger(*arguments)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    step_ledger.main(["--instances", "8", "--precision", "32-true", "--operations", "2"])
    out = capsys.readouterr().out
    assert f"a step on 8 instances, 32-true, {OURS}: " in out
    assert f"a step on 8 instances, 32-true, {EAGER}: " in out
    with pytest.raises(SystemExit):
        step_ledger.main(["--instances", "1"])
    assert "--instances: expected at least 2, got 1" in capsys.readouterr().err


def test_brief_shows_ledgers(ledgers: dict[tuple[str, str], dict[str, Any]]) -> None:
    result: dict[str, Any] = {
        **{key: [] for key in ("capture", "timings", "steps", "aims", "broken", "notes")},
        "parity": {},
        "run": {"profile": "quick", "seconds": None},
    }
    assert "predicted" not in brief(result)
    assert f"{ledgers['32-true', OURS]['total']['calls']:,} calls" in brief({**result, "ledger": [*ledgers.values()]})
