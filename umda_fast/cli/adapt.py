"""`umda-fast adapt`: a trained model for new labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.app import BackendName, Device, Format, RunDir, app

__all__: list[str] = []


@app.command(epilog="Example: umda-fast adapt runs/first --data new_labels.npz --out runs/adapted")
def adapt(
    run: RunDir,
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="Bags with the new labels.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new run directory.")],
    format: Format = None,
    device: Device = None,
    backend: BackendName = None,
) -> None:
    """Fit heads for new tasks on a trained model's frozen trunk, in closed form: seconds, no training."""
    from umda_fast.cli.render import make_console, metrics_table
    from umda_fast.studies.readapt import readapt
    from umda_fast.train import load_run

    result = readapt(
        load_run(run), out, source=data, format=format, device=device or "auto", backend=backend or "auto"
    )
    console = make_console()
    if result is not None:
        console.print(metrics_table({"": result.tasks}, title=f"{out}, {result.bags} bags"))
    console.print(f"run directory: {out}", soft_wrap=True)
