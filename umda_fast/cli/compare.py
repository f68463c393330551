"""`umda-fast compare`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umda_fast.cli.app import (
    BackendName,
    ConfigFile,
    Device,
    Format,
    Quiet,
    Set,
    Source,
    _default_out,
    _keep_pages,
    _values,
    app,
)

if TYPE_CHECKING:
    from rich.table import Table


@app.command(epilog="Example: umda-fast compare --data slides.npz --models umda,gated_attention,late_fusion --seeds 3")
def compare(
    data: Source = None,
    format: Format = None,
    models: Annotated[
        str | None,
        typer.Option("--models", metavar="A,B,...", help="Architectures, by commas.  [default: all]"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of every model.")] = 3,
    folds: Annotated[
        int | None, typer.Option("--folds", min=2, help="Cross-validate instead: one run per fold.")
    ] = None,
    config: ConfigFile = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the runs and the table go.")] = None,
    device: Device = None,
    backend: BackendName = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the first run.  [default: 0]")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training bags.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train UMDA and plain baselines with the same trainer and budget and print a table. Started again with the same
    --out, it continues.
    """
    from umda_fast.cli.render import make_console
    from umda_fast.runtime.config import ARCHITECTURES
    from umda_fast.studies import compare_models
    from umda_fast.train import load_config

    settings = load_config(config, set_ or (), _values(data, format, device, backend, seed, epochs))
    directory = out or _default_out("compare", settings.data.source)
    _keep_pages()
    names = tuple(ARCHITECTURES) if models is None else tuple(name.strip() for name in models.split(","))
    result = compare_models(settings, directory, models=names, seeds=seeds, folds=folds, progress=not quiet)
    console = make_console()
    console.print(comparison_table(result))
    console.print(f"as JSON and Markdown: {directory / 'compare.json'}, {directory / 'compare.md'}", soft_wrap=True)


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Mean and standard deviation over the runs, a line for each model."""
    from rich.table import Table

    def cell(value: Mapping[str, Any], digits: int = 4) -> str:
        if value["mean"] is None:
            return "-"
        return f"{value['mean']:.{digits}f}" + ("" if value["std"] is None else f" ± {value['std']:.{digits}f}")

    table = Table(title=f"{result['source']}: mean ± standard deviation over the runs", title_justify="left")
    table.add_column("model")
    for title in ("mean score", *(f"{task} ({metric})" for task, metric in result["primary"].items())):
        table.add_column(title, justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("parameters", justify="right")
    for name, model in result["models"].items():
        scores = [model["tasks"][task][metric] for task, metric in result["primary"].items()]
        figures = [cell(model["mean_score"]), *(cell(score) for score in scores), cell(model["seconds"], 1)]
        table.add_row(name, *figures, f"{model['parameters']:,}")
    return table
