"""Gate 5: the machine code of the kernels that the GPU suite times has the figures of the committed budget.

A kernel whose source is that of the budget has been compiled and read before; of those a few are compiled again, drawn
with a seed (``UMDA_FAST_SEED``, 0 by default), and all whose source is another one. All of them: ``python -m
tests.machine_code.budget``, after which ``git diff`` shows what changed.
"""

import json
import os
import random
from typing import Any

import pytest

from tests.machine_code.budget import BUDGET, figures, model, versions
from tests.machine_code.catalogue import CALIBRATION, ENTRIES, Entry
from tests.machine_code.devices import DEVICES

#: Triton kernels that are compiled again although nothing says that they changed, each for one architecture.
SAMPLE = 2
#: How far a prediction may lie below the budget's with another compiler.
OTHER_COMPILER = 0.1

SEED = int(os.environ.get("UMDA_FAST_SEED", "0"))


@pytest.fixture(scope="module")
def budget() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BUDGET.read_text())
    return found


def hold(entry: Entry, architecture: int, budget: dict[str, Any]) -> None:
    """Exactly the figures of the budget; of another compiler, about the share."""
    wanted = budget["kernels"][entry.name][f"sm_{architecture}"]
    found = json.loads(json.dumps(figures(entry, architecture)))
    compiler = "nvcc" if entry.launches is None else "triton"
    where = f"{entry.name}, sm_{architecture} (seed {SEED}; python -m tests.machine_code.budget writes a new budget)"
    if versions()[compiler] == budget[compiler]:
        assert found == wanted, where
    else:
        assert found["share"] >= wanted["share"] - OTHER_COMPILER, where


def test_it_names_every_kernel_and_no_other(budget: dict[str, Any]) -> None:
    names = [entry.name for entry in (*ENTRIES, *(entry for _, entry in CALIBRATION))]
    assert list(budget["kernels"]) == names
    for name, found in budget["kernels"].items():
        assert set(found) == {"source", *(f"sm_{architecture}" for architecture in DEVICES)}, name


def test_it_was_made_by_the_present_model(budget: dict[str, Any]) -> None:
    assert budget["model"] == model(), "python -m tests.machine_code.budget makes it anew"


def test_nothing_spills(budget: dict[str, Any]) -> None:
    spilling = [
        (entry.name, architecture)
        for entry in ENTRIES
        for architecture in DEVICES
        if budget["kernels"][entry.name][f"sm_{architecture}"]["stack"]
    ]
    assert not spilling


def test_triton_kernels_have_the_figures_of_the_budget(budget: dict[str, Any]) -> None:
    entries = [entry for entry in ENTRIES if entry.launches is not None]
    same_compiler = versions()["triton"] == budget["triton"]  # with another one every digest is another
    changed = [
        (entry, architecture)
        for entry in entries
        if same_compiler and entry.source() != budget["kernels"][entry.name]["source"]
        for architecture in DEVICES
    ]
    everything = [(entry, architecture) for entry in entries for architecture in DEVICES]
    for entry, architecture in {*changed, *random.Random(SEED).sample(everything, SAMPLE)}:
        hold(entry, architecture, budget)


def test_cuda_kernels_have_the_figures_of_the_budget(budget: dict[str, Any]) -> None:
    """Of the library that gate 4 builds."""
    entries = [entry for entry in ENTRIES if entry.launches is None]
    unchanged = all(entry.source() == budget["kernels"][entry.name]["source"] for entry in entries)
    architectures = random.Random(SEED).sample(list(DEVICES), 1) if unchanged else list(DEVICES)
    for architecture in architectures:
        for entry in entries:
            hold(entry, architecture, budget)


def test_the_model_agrees_with_what_is_published(budget: dict[str, Any]) -> None:
    """Nothing limits a copy, and no published kernel was measured to be faster than is predicted."""
    for published, entry in CALIBRATION:
        shares = {
            architecture: budget["kernels"][entry.name][f"sm_{architecture}"]["share"] for architecture in DEVICES
        }
        if entry.kernel == "copy_kernel":
            assert set(shares.values()) == {1.0}
        for architecture, measured in published.measured.items():
            assert shares[architecture] >= measured, (entry.name, architecture)
