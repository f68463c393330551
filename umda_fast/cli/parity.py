"""`umda-fast parity`: whether this machine computes what the reference does."""

from __future__ import annotations

from typing import Annotated

import typer

from umda_fast.cli.common import save_json
from umda_fast.cli.options import JsonFile

EXAMPLE = "umda-fast parity --device cpu --json parity.json"


def parity(
    *,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    json: JsonFile = None,
) -> None:
    """Hold every operation, on every backend, to the float64 reference; exit code 1 if one fails."""
    from umda_fast.cli.render import make_console, parity_table
    from umda_fast.parity import run_parity

    report = run_parity(device)
    table, passed = parity_table(report)
    make_console().print(table)
    save_json(json, report)
    if not passed:
        raise typer.Exit(1)
