"""`umda-fast profile`: where a training step spends its time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import directory_of, load_settings, values
from umda_fast.cli.options import Bags, Computing, Configuration, SkipBad, out_option, seed_option
from umda_fast.heap import settle_heap

EXAMPLE = "umda-fast profile --data digits --set model.layers=3 --steps 10 --out profiles/digits"


def profile(
    *,
    bags: Bags,
    configuration: Configuration,
    out: Annotated[Path | None, out_option("For profile.json and trace.json.gz.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to time, and as many to count.")] = 5,
    computing: Computing,
    seed: Annotated[int | None, seed_option("the run")] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Take a few warm training steps and show where their time goes, block by block, beside the least that the bytes
    they move would take; leaves the table as JSON and a Chrome trace.
    """
    from umda_fast.cli.render import make_console, print_profile
    from umda_fast.train import profile_steps

    settings = load_settings(configuration, values(bags, computing, seed=seed, epochs=None, skip_bad=skip_bad))
    settle_heap()
    directory = directory_of("profile", out, settings)
    console = make_console()
    print_profile(console, profile_steps(settings, directory, steps=steps), directory)
