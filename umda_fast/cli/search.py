"""`umda-fast search`: a configuration chosen by inner folds, and what choosing so is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import directory_of, load_settings, named, values
from umda_fast.cli.options import Bags, Computing, Configuration, Epochs, Quiet, SkipBad, out_option, seed_option
from umda_fast.heap import settle_heap

EXAMPLE = "umda-fast search --data slides/ --trials 20 --out runs/search"


def search(
    *,
    bags: Bags,
    trials: Annotated[int, typer.Option("--trials", min=2, help="Configurations tried in each fold.")] = 20,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Outer folds, on which the search is measured.")] = 5,
    inner: Annotated[int, typer.Option("--inner", min=2, help="Inner folds, by which is chosen.")] = 3,
    over: Annotated[
        str | None,
        typer.Option("--over", metavar="KEY,KEY,...", help="What is chosen, by commas.  [default: all that fits]"),
    ] = None,
    configuration: Configuration,
    out: Annotated[Path | None, out_option("Where the runs, search.json and best.yaml go.")] = None,
    computing: Computing,
    seed: Annotated[int | None, seed_option("folds, trials and runs")] = None,
    epochs: Epochs = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Search over learning rate, dropout, weight decay, cross-view attention and the graph, on training bags only, and
    measure on outer folds, which have no say, what the search chose and what was configured. best.yaml is for `train
    --config`. Started again with the same --out, it continues. Needs the extra `search`.
    """
    from umda_fast.cli.render import make_console, search_table
    from umda_fast.studies import search as search_settings

    given = values(bags, computing, seed=seed, epochs=epochs, skip_bad=skip_bad)
    settings = load_settings(configuration, given)
    directory = directory_of("search", out, settings)
    settle_heap()
    result = search_settings(
        settings, directory, trials=trials, folds=folds, inner=inner, over=named(over), progress=not quiet
    )
    console = make_console()
    console.print(search_table(result))
    best = ", ".join(f"{key}={value}" for key, value in result["best"]["chosen"].items())
    console.print(f"chosen on the training bags: {best}", soft_wrap=True)
    console.print(f"to train with: {directory / 'best.yaml'}; every trial: {directory / 'search.json'}", soft_wrap=True)
