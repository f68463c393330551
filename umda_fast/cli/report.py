"""`umda-fast report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.app import BackendName, Device, Format, Quiet, RunDir, SkipBad, app

__all__: list[str] = []


@app.command(epilog="Example: umda-fast report runs/first && open runs/first/report.html")
def report(
    run: RunDir,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="The file.  [default: RUN/report.html]")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="Which bags.  [default: the run's own data]")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which part of the data is measured.")] = "test",
    maps: Annotated[int, typer.Option("--maps", min=0, help="Bags whose attention is drawn.")] = 4,
    samples: Annotated[int, typer.Option("--samples", min=10, help="Draws for the confidence intervals.")] = 1000,
    format: Format = None,
    device: Device = None,
    backend: BackendName = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML file on a run: scores with confidence intervals, errors, calibration, curves, attention."""
    from umda_fast.cli.render import make_console
    from umda_fast.studies.report import write_report
    from umda_fast.train import load_run

    path = write_report(
        load_run(run),
        out,
        source=data,
        split=split,
        maps=maps,
        samples=samples,
        format=format,
        device=device or "auto",
        backend=backend or "auto",
        skip_bad=skip_bad,
        progress=not quiet,
    )
    make_console().print(f"report: {path}", soft_wrap=True)
