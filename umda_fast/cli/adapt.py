"""`umda-fast adapt`: a trained model for new labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import source_options
from umda_fast.cli.options import Computing, Format, RunDir, Set, out_option

EXAMPLE = "umda-fast adapt runs/first --data new_labels.npz --out runs/adapted"


def adapt(
    *,
    run: RunDir,
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="Bags with the new labels.")],
    out: Annotated[Path, out_option("The new run directory.")],
    format: Format = None,
    set_: Set = None,
    computing: Computing,
) -> None:
    """Fit heads for new tasks on a trained model's frozen trunk, in closed form: seconds, no training."""
    from umda_fast.cli.render import make_console, metrics_table
    from umda_fast.studies.readapt import readapt
    from umda_fast.train import load_run

    result = readapt(
        load_run(run), out, source=data, format=format, options=source_options(set_, False), **computing.arguments()
    )
    console = make_console()
    if result is not None:
        console.print(metrics_table({"": result.tasks}, title=f"{out}, {result.bags} bags"))
    console.print(f"run directory: {out}", soft_wrap=True)
