"""`umda-fast parity`: whether this machine computes what the reference does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import check_outputs, named, save_json
from umda_fast.cli.options import JsonFile

EXAMPLE = "umda-fast parity --require cpp --junit parity.xml"


def parity(
    *,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda.  [default: the CPU, and CUDA if there is a device]")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", metavar="NAME,NAME", help="cpp, triton, cuda; fails where one tests nothing."),
    ] = None,
    ops: Annotated[str | None, typer.Option("--ops", metavar="OP,OP", help="Some operations; all if left out.")] = None,
    require: Annotated[
        str | None, typer.Option("--require", metavar="NAME,NAME", help="Backends that must have been tested.")
    ] = None,
    json: JsonFile = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE.xml", help="Also write the result as JUnit XML.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Failures and the outcome only, no table.")] = False,
) -> None:
    """Hold every operation, on every backend, to the float64 reference. Exit code 0: all that was tested passed, and
    something was; 1: something failed; 2: a mistake, or a device or backend that was named is not there; 3: nothing was
    tested, or not all of --require.
    """
    from umda_fast.cli.render import make_console, parity_table
    from umda_fast.errors import DataError
    from umda_fast.files import write_text
    from umda_fast.ops import get_backend
    from umda_fast.parity.check import EXIT_CODES, check_parity, failure_line, junit_xml

    check_outputs(json, junit)
    default = get_backend()  # of UMDA_FAST_BACKEND
    if backend is None and default == "reference":
        raise DataError("UMDA_FAST_BACKEND=reference: expected cpp, triton, cuda or auto, to be held to the reference")
    chosen = named(backend) if backend is not None or default == "auto" else [default]
    asked = "UMDA_FAST_BACKEND" if backend is None else "--backend"
    report = check_parity(
        devices=named(device), backends=chosen, ops=named(ops), require=named(require) or (), asked=asked
    )
    save_json(json, "parity", report)
    if junit is not None:
        write_text(junit, junit_xml(report))
    console = make_console()
    if not quiet:
        console.print(parity_table(report))
    for row in report["rows"]:
        if row["verdict"] == "fail":
            console.print(failure_line(row), soft_wrap=True, markup=False, highlight=False, style="bold red")
    counts = ((name, count - report["failed"][name], count) for name, count in report["tested"].items())
    tested = ", ".join(f"{name} {passed} of {count}" for name, passed, count in counts)
    missing = f": {', '.join(report['missing'])}" if report["missing"] else ""
    console.print(f"parity on {', '.join(report['devices'])}: {report['outcome']}{missing} ({tested} passed)")
    if not report["passed"]:
        raise typer.Exit(EXIT_CODES[report["outcome"]])
