"""`umda-fast evaluate`: how good a trained model is."""

from __future__ import annotations

from typing import Annotated

from umda_fast.cli.common import check_outputs, load_runs, number, save_json
from umda_fast.cli.options import Bags, By, JsonFile, RunDirs, TrainedOn, split_option

SAMPLES = 1000
"""Draws of bags, or of patients, for the intervals."""
EXAMPLE = "umda-fast evaluate runs/first --split val --json scores.json"


def evaluate(
    *,
    runs: RunDirs,
    bags: Bags,
    split: Annotated[
        str | None, split_option("test, val, train, new or all.  [default: test; of other data than the run's own all]")
    ] = None,
    by: By = "bag",
    json: JsonFile = None,
    use: TrainedOn,
) -> None:
    """Measure a trained model, or the mean of several, on a split of its own data or on other data.

    Bags that a run was trained or validated on (its splits.csv) are in no figure but that of their split.
    """
    from umda_fast.cli.render import make_console, metrics_table
    from umda_fast.train import evaluate as evaluate_run
    from umda_fast.train.data import measured_split

    check_outputs(json)
    loaded = load_runs(runs, use)
    name = ", ".join(str(run) for run in runs)
    split = measured_split(loaded, bags.data, split)
    samples = 0 if json is None else SAMPLES
    result = evaluate_run(
        loaded, source=bags.data, format=bags.format, split=split, samples=samples, by=by, **use.arguments()
    )
    console = make_console()
    counts = {"bags": result.bags} if result.patients is None else {"bags": result.bags, "patients": result.patients}
    counted = ", ".join(f"{count} {what}" for what, count in counts.items())
    console.print(metrics_table({"": result.tasks}, title=f"{name}, split {split}, {counted}"))
    console.print(f"mean_score {number(result.mean_score)}")
    report = {
        "run": name,
        "data": {"source": bags.data or loaded.config.data.source, "split": split, **counts},
        "tasks": result.tasks,
        "mean_score": result.mean_score,
        "intervals": result.intervals,
        "view_consistency": result.view_consistency,
        "notes": loaded.notes,
    }
    save_json(json, "evaluate", report)
