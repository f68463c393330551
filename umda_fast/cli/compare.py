"""`umda-fast compare`: UMDA beside plain models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import directory_of, load_settings, named, values
from umda_fast.cli.options import Bags, Computing, Configuration, Epochs, Quiet, out_option, seed_option
from umda_fast.heap import settle_heap

EXAMPLE = "umda-fast compare --data slides.npz --models umda,gated_attention,late_fusion --seeds 3"


def compare(
    *,
    bags: Bags,
    models: Annotated[
        str | None,
        typer.Option("--models", metavar="A,B,...", help="Architectures, by commas.  [default: all]"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of every model.")] = 3,
    folds: Annotated[
        int | None, typer.Option("--folds", min=2, help="Cross-validate instead: one run per fold.")
    ] = None,
    configuration: Configuration,
    out: Annotated[Path | None, out_option("Where the runs and the table go.")] = None,
    computing: Computing,
    seed: Annotated[int | None, seed_option("the first run")] = None,
    epochs: Epochs = None,
    quiet: Quiet = False,
) -> None:
    """Train UMDA and plain baselines with the same trainer and budget and print a table. Started again with the same
    --out, it continues.
    """
    from umda_fast.cli.render import comparison_table, make_console
    from umda_fast.runtime.config import ARCHITECTURES
    from umda_fast.studies import compare_models

    settings = load_settings(configuration, values(bags, computing, seed=seed, epochs=epochs))
    directory = directory_of("compare", out, settings)
    settle_heap()
    names = tuple(ARCHITECTURES) if models is None else tuple(named(models) or ())
    result = compare_models(settings, directory, models=names, seeds=seeds, folds=folds, progress=not quiet)
    console = make_console()
    console.print(comparison_table(result))
    console.print(f"as JSON and Markdown: {directory / 'compare.json'}, {directory / 'compare.md'}", soft_wrap=True)
