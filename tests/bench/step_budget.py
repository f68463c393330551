"""Calls and bytes that one training step may take. ``python -m tests.bench.step_budget`` writes ``step_budget.json``,
which ``test_step_ledger.py`` holds a step to."""

import json
from pathlib import Path
from typing import Any

import torch

from bench.step_ledger import PRECISIONS, ledger
from bench.workloads import OURS

BUDGET = Path(__file__).with_name("step_budget.json")
INSTANCES = 64


def spent_by(found: dict[str, Any]) -> dict[str, Any]:
    """Calls and bytes of a step from its ledger, in all and by block."""
    blocks = {row["block"]: {"calls": row["calls"], "bytes": row["bytes"]} for row in found["blocks"]}
    return {"calls": found["total"]["calls"], "bytes": found["total"]["bytes"], "blocks": blocks}


def main() -> None:
    """Writes what a step takes now as the budget."""
    steps = {name: spent_by(ledger(INSTANCES, name, OURS)) for name in PRECISIONS}
    budget = {"torch": torch.__version__, "instances": INSTANCES, **steps}
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    main()
