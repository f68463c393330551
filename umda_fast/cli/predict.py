"""`umda-fast predict`: what a trained model says of every bag."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import check_outputs, load_runs, numbers
from umda_fast.cli.options import By, Format, OwnData, RunDirs, TrainedOn, out_option, split_option

EXAMPLE = "umda-fast predict runs/first --data new.npz --out predicted.csv --attention attention.h5"


def predict(
    *,
    runs: RunDirs,
    out: Annotated[Path, out_option("One line a bag, or a patient.", metavar="FILE.csv")],
    data: OwnData = None,
    attention: Annotated[
        Path | None, typer.Option("--attention", metavar="FILE.h5", help="Also write each instance's attention.")
    ] = None,
    split: Annotated[str | None, split_option("Only test, val, train or new.  [default: all]")] = None,
    refer_below: Annotated[
        float | None,
        typer.Option(
            "--refer-below", min=0.0, max=1.0, help="Add calibrated confidences; name the tasks below this one."
        ),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option("--times", metavar="T,T,...", help="Write survival at these, in the unit of the task."),
    ] = None,
    by: By = "bag",
    format: Format = None,
    use: TrainedOn,
) -> None:
    """Write a trained model's predictions, or the mean of several models', for every bag."""
    from umda_fast.cli.render import make_console
    from umda_fast.studies import predict as predict_run

    check_outputs(out, attention)
    count = predict_run(
        load_runs(runs, use),
        source=data,
        out=out,
        attention=attention,
        split=split,
        refer_below=refer_below,
        times=numbers("times", times),
        by=by,
        format=format,
        **use.arguments(),
    )
    also = f" and {attention}" if attention is not None else ""
    make_console().print(f"predictions for {count} {by}s in {out}{also}", soft_wrap=True)
