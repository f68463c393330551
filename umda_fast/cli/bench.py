"""`umda-fast bench`: how fast the operations are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from umda_fast.cli.common import check_outputs, named
from umda_fast.cli.options import JsonFile, Quiet

EXAMPLE = "umda-fast bench --device cuda --ops cross_view,knn --report bench.html"


def bench(
    *,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda or cpu.  [default: cuda if there is one]")
    ] = None,
    ops: Annotated[
        str | None, typer.Option("--ops", metavar="OP,OP", help="Some operations, or training_step; all if left out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: whether it runs, not how fast.")] = False,
    seconds: Annotated[float | None, typer.Option("--seconds", min=1, help="Time budget.")] = None,
    json: JsonFile = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Also write tables and bars, one file.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Time the operations beside what PyTorch alone does. Parity comes first, and what is wrong is not timed; the
    exit code is then 1.
    """
    import torch

    from umda_fast.bench.gpu_suite import brief, run, save_json, timed_operations
    from umda_fast.bench.report import write_html
    from umda_fast.cli.render import make_console
    from umda_fast.errors import DataError

    check_outputs(json, report)
    wanted = named(ops)
    known = timed_operations()
    wrong = sorted(set(wanted or ()) - set(known))
    if wrong or wanted == []:
        raise DataError(f"--ops: expected some of {', '.join(known)}; got {', '.join(wrong) or 'none'}")
    if device not in (None, "cpu", "cuda"):
        raise DataError(f"--device: expected cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch finds no CUDA device")

    def save(result: dict[str, Any]) -> None:
        if json is not None:
            save_json(json, result)
        if report is not None:
            write_html(report, result)

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = run(place, quick=quick, only=wanted, seconds=seconds, save=save, say=say)
    make_console().print(brief(result), soft_wrap=True, markup=False, highlight=False)
    if not result["passed"]:
        raise typer.Exit(1)
