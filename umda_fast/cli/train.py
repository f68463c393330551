"""`umda-fast train`: one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from umda_fast.cli.common import directory_of, load_settings, number, values
from umda_fast.cli.options import Bags, Computing, Configuration, Epochs, Quiet, SkipBad, out_option, seed_option
from umda_fast.heap import settle_heap

EXAMPLE = "umda-fast train --data digits --set model.layers=3 --epochs 20 --out runs/first"


def train(
    *,
    bags: Bags,
    configuration: Configuration,
    out: Annotated[Path | None, out_option("The run directory.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out where it was stopped.")] = False,
    computing: Computing,
    seed: Annotated[int | None, seed_option("the run")] = None,
    epochs: Epochs = None,
    skip_bad: SkipBad = False,
    profile: Annotated[
        int, typer.Option("--profile", min=0, metavar="N", help="Also profile N steps; results stay the same.")
    ] = 0,
    quiet: Quiet = False,
) -> None:
    """Train a model, measure it on the test split, and leave a run directory."""
    from umda_fast.cli.render import make_console, metrics_table, print_profile
    from umda_fast.train import ConfigError, run_config
    from umda_fast.train import train as train_run
    from umda_fast.train.linear import comparison_lines

    given = values(bags, computing, seed=seed, epochs=epochs, skip_bad=skip_bad)
    if resume:
        if out is None:
            raise ConfigError("--resume: say which run with --out DIR")
        fixed: dict[str, Any] = {"--data": bags.data, "--format": bags.format, "--config": configuration.config}
        fixed |= {"--set": configuration.set_, "--seed": seed, "--skip-bad": skip_bad}
        wrong = [name for name, value in fixed.items() if value]
        if wrong:
            raise ConfigError(
                f"{wrong[0]}: a resumed run keeps its configuration; "
                "only --epochs, --device and --backend may change"
            )
        settings = run_config(out, given)
    else:
        settings = load_settings(configuration, given)
    settle_heap()
    directory = directory_of("train", out, settings)
    result = train_run(settings, directory, resume=resume, progress=not quiet, profile=profile)
    console = make_console()
    bags = result.metrics["data"]["bags"][result.split]
    console.print(metrics_table({"": result.metrics["tasks"]}, title=f"Split {result.split}, {bags} bags"))
    skill, score, seconds = (result.metrics[name] for name in ("skill", "mean_score", "seconds"))
    tasks = ", ".join(f"{task} {number(value)}" for task, value in skill["tasks"].items())
    console.print(f"skill {number(skill['mean'])} ({tasks}; 0: no better than a constant, 1: perfect)", soft_wrap=True)
    kept = result.metrics["kept"]
    if kept["split"] is not None:
        best = f"the best on {kept['split']} by train.select: {kept['select']} {number(kept['score'])}"
        console.print(f"weights of epoch {kept['epoch']}, {best}", soft_wrap=True)
    if result.metrics["linear"] is not None:
        console.print("On validation bags, beside a linear model of bag means:")
        for line in comparison_lines(result.metrics["linear"]):
            console.print(f"  {line}", soft_wrap=True, highlight=False)
    elif settings.train.linear == "mix" and settings.model.get("architecture", "umda") != "linear":
        console.print("No linear model is mixed in: there are no validation bags to weigh it on.", soft_wrap=True)
    if result.profile is not None:
        print_profile(console, result.profile, result.directory / "profile")
    console.print(f"mean_score {number(score)} after {seconds:.0f} s of training")
    console.print(f"run directory: {result.directory}, plots in {result.directory / 'plots'}", soft_wrap=True)
