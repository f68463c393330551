"""The figures of every kernel of the catalogue, as a committed file and as a table.

python -m tests.machine_code.budget            # compiles what has changed, writes budget.json
python -m tests.machine_code.budget --table    # prints the table of docs/performance.md from it
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import triton

from tests.cuda_host import _nvcc
from umda_fast.files import write_text

from .binary import Binary
from .catalogue import CALIBRATION, ENTRIES, Entry
from .cost import Prediction, path, work
from .devices import DEVICES

__all__ = ["BUDGET", "figures", "versions"]

BUDGET = Path(__file__).with_name("budget.json")

Figures = dict[str, Any]


def versions() -> dict[str, str]:
    """Of what compiles; others allocate and order in other ways."""
    return {"triton": triton.__version__, "nvcc": _nvcc.version()}


def figures(entry: Entry, architecture: int) -> Figures:
    """What is read from an entry's machine code, and what is predicted from that."""
    binary, prediction = entry.predict(architecture)
    return _figures(entry, binary, prediction)


def _figures(entry: Entry, binary: Binary, prediction: Prediction) -> Figures:
    code = path(binary.function, entry.nest)
    done = work(code)
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter(), "copy": Counter()}
    for x, _ in code:
        if x.unit in widths:
            widths[x.unit][x.width] += 1
    tensor = done.units.get("tensor", 0.0)
    per = {"tensor instruction": tensor} if tensor else {"KB": (entry.floor or done.moved) / 1024}
    [(measure, count)] = per.items()
    return {
        "registers": binary.registers,
        "shared": binary.shared + entry.dynamic,
        "stack": binary.stack + binary.local,
        "warps": prediction.warps,
        "in_flight": round(prediction.in_flight),
        "widths": {unit: {str(width): n for width, n in sorted(x.items())} for unit, x in widths.items() if x},
        "per": measure,
        "instructions": {"all": round(done.slots / count, 1)}
        | {unit: round(n / count, 1) for unit, n in sorted(done.units.items())},
        "cycles": round(prediction.cycles),
        "of": prediction.of,
        "bounds": {name: round(bound, 3) for name, bound in sorted(prediction.bounds.items()) if bound < 1},
        "share": round(prediction.share, 3),
        "bound": prediction.bound,
    }


def model() -> str:
    """Digest of the code that figures are made by, whatever its docstrings and comments say."""
    found = hashlib.sha256()
    for name in ("binary", "catalogue", "cost", "devices", "sass"):
        tree = ast.parse(BUDGET.with_name(f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""
        found.update(ast.dump(tree).encode())
    return found.hexdigest()[:16]


def write() -> None:
    """Writes the budget, kernel by kernel: what neither the kernel, the compiler nor the model has changed stays."""
    head = {**versions(), "model": model()}
    before = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"kernels": {}}
    known = before["kernels"] if all(before.get(key) == value for key, value in head.items()) else {}
    kernels: dict[str, Figures] = {}
    for entry in (*ENTRIES, *(entry for _, entry in CALIBRATION)):
        source = entry.source()
        found = known.get(entry.name, {})
        if found.get("source") != source:
            found = {"source": source} | {
                f"sm_{architecture}": figures(entry, architecture) for architecture in DEVICES
            }
            print(entry.name, flush=True)
        kernels[entry.name] = found
        kept = kernels | {name: x for name, x in known.items() if name not in kernels}
        write_text(BUDGET, json.dumps({**head, "kernels": kept}, indent=1) + "\n")  # an interrupted run goes on here
    write_text(BUDGET, json.dumps({**head, "kernels": kernels}, indent=1) + "\n")


def table() -> str:
    """Markdown: predicted shares by kernel and GPU, then the calibration beside what is published."""
    kernels = json.loads(BUDGET.read_text())["kernels"]
    names = [device.name for device in DEVICES.values()]
    lines = [
        f"| kernel (bfloat16) | share of | {' | '.join(names)} | H200: instructions | warps | bytes in flight |",
        f"| --- | --- | {' | '.join('---' for _ in names)} | --- | --- | --- |",
    ]

    def share(found: Figures) -> str:
        return f"{found['share']:.0%}" + ("" if found["bound"] == found["of"] else f", {found['bound']}")

    for entry in ENTRIES:
        found = {architecture: kernels[entry.name][f"sm_{architecture}"] for architecture in DEVICES}
        at = found[90]
        shares = " | ".join(share(found[architecture]) for architecture in DEVICES)
        instructions = f"{at['instructions']['all']:,.0f} per {at['per']}"
        lines.append(f"| {entry.name} | {at['of']} | {shares} | {instructions} | {at['warps']} | {at['in_flight']:,} |")
    lines += ["", "| published | GPU | measured | predicted | off by |", "| --- | --- | --- | --- | --- |"]
    for published, entry in CALIBRATION:
        for architecture, measured in published.measured.items():
            predicted = kernels[entry.name][f"sm_{architecture}"]["share"]
            gpu = published.gpus.get(architecture, DEVICES[architecture].name)
            off = f"{100 * (predicted - measured):+.0f} points"
            lines.append(f"| {entry.name} | {gpu} | {measured:.0%} | {predicted:.0%} | {off} |")
    return "\n".join(lines)


def main() -> None:
    """Writes the budget, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table from the budget as it is")
    if parser.parse_args().table:
        print(table())
    else:
        write()


if __name__ == "__main__":
    main()
