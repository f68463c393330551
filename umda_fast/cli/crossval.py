"""`umda-fast crossval`: one run a fold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import directory_of, load_settings, numbers, values, whole_numbers
from umda_fast.cli.options import Bags, Computing, Configuration, Epochs, Quiet, SkipBad, out_option, seed_option
from umda_fast.heap import settle_heap

EXAMPLE = "umda-fast crossval --data musk1.npz --folds 10 --repeats 5 --out runs/musk1"


def crossval(
    *,
    bags: Bags,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Parts the bags are cut into.")] = 10,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times the bags are cut anew.")] = 1,
    shots: Annotated[
        str | None,
        typer.Option("--shots", metavar="K,K,...", help="Train on K bags of each class, for each K on the same folds."),
    ] = None,
    configuration: Configuration,
    out: Annotated[Path | None, out_option("Where each fold's run goes.")] = None,
    computing: Computing,
    seed: Annotated[int | None, seed_option("folds and runs")] = None,
    epochs: Epochs = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Cross-validate. Started again with the same --out, it continues: finished folds are kept, a stopped one
    is resumed, and the bags of all folds stay those that they were.

    With --shots the training bags of a fold are K of each class, drawn by the seed, without a validation part.
    """
    from umda_fast.cli.render import crossval_table, make_console, shots_table
    from umda_fast.studies import cross_validate, few_shot

    given = values(bags, computing, seed=seed, epochs=epochs, skip_bad=skip_bad)
    settings = load_settings(configuration, given)
    directory = directory_of("crossval", out, settings)
    settle_heap()
    console = make_console()
    wanted = numbers("shots", shots)
    if wanted is not None:
        study = few_shot(
            settings, directory, whole_numbers("shots", wanted), folds=folds, repeats=repeats, progress=not quiet
        )
        console.print(shots_table(study))
        console.print(f"every fold's result: {directory / 'shots.json'} and below", soft_wrap=True)
        return
    result = cross_validate(settings, directory, folds=folds, repeats=repeats, progress=not quiet)
    console.print(crossval_table(result))
    console.print(f"every fold's result: {directory / 'crossval.json'}", soft_wrap=True)
    if result["pooled"]:
        console.print(f"predictions for test bags: {directory / 'out_of_fold.csv'}", soft_wrap=True)
