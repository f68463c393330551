"""`umda-fast report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import check_outputs, load_runs
from umda_fast.cli.options import Format, OwnData, PatchSize, RunDir, TrainedOn, out_option, split_option

EXAMPLE = "umda-fast report runs/first && open runs/first/report.html"


def report(
    *,
    run: RunDir,
    out: Annotated[Path | None, out_option("The file.  [default: RUN/report.html]", metavar="FILE.html")] = None,
    data: OwnData = None,
    split: Annotated[
        str | None, split_option("What is measured: test, val, train, new or all.  [default: as `evaluate`]")
    ] = None,
    maps: Annotated[int, typer.Option("--maps", min=0, help="Bags whose attention is drawn.")] = 4,
    patch_size: PatchSize = None,
    samples: Annotated[int, typer.Option("--samples", min=10, help="Draws for the confidence intervals.")] = 1000,
    format: Format = None,
    use: TrainedOn,
) -> None:
    """Write one HTML file on a run: scores with confidence intervals, errors, calibration, curves, attention."""
    from umda_fast.cli.render import make_console
    from umda_fast.studies.report import write_report

    check_outputs(out)
    path = write_report(
        load_runs([run], use),
        out,
        source=data,
        split=split,
        maps=maps,
        patch_size=patch_size,
        samples=samples,
        format=format,
        **use.arguments(),
    )
    make_console().print(f"report: {path}", soft_wrap=True)
