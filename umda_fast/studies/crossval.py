"""Cross-validation: a run directory for each fold, so that it can be stopped and continued at any point."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.files import json_ready, write_json
from umda_fast.runtime.config import RunConfig, as_dict, make_config
from umda_fast.runtime.fabric import make_fabric, processes_of
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.runtime.together import one_decides
from umda_fast.train.data import load_configured_folds
from umda_fast.train.run import train

__all__ = ["check_settings", "cross_validate", "figures", "finished_run"]


def cross_validate(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    folds: int = 10,
    repeats: int = 1,
    datasets: Iterable[Mapping[str, BagDataset]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """`repeats` times `folds` runs, each measured on the bags of its fold.

    The validation part, which decides on the best epoch, comes out of the training folds; the test fold has
    no say.

    Args:
        config: of every run; the run of fold f of repeat r has the seed `config.seed + r * folds + f`.
        out: holds `repeat-R-fold-F/` for each run, and crossval.json, brought up to date after every fold.
            What is finished there is not done again, and a run that was stopped is resumed.
        datasets: `folds * repeats` mappings split -> bags (train, test and, if there, val), repeat by repeat,
            instead of the folds of `config.data.source`.
        progress: show progress on standard error.

    Returns:
        What crossval.json holds: settings; `results`, one entry for each fold; for `mean_score` and each
        metric of each task `mean`, `std` (of a sample), `min`, `max` and `folds`, over the folds in which it
        is defined.

    Raises:
        DataError: too many folds, or `out` holds a cross-validation with other settings.
    """
    processes = processes_of(make_fabric(config))
    directory = Path(out if processes is None else processes.object_from_first(os.fspath(out)))
    settings = {
        "source": config.data.source,
        "folds": folds,
        "repeats": repeats,
        "config": json_ready({**as_dict(config), "device": None, "backend": None}),
    }
    one_decides(
        processes, lambda: check_settings(directory / "crossval.json", settings, "a cross-validation")
    )
    if datasets is None:
        datasets = load_configured_folds(config, folds, repeats)
    results: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    for number, parts in enumerate(datasets):
        repeat, fold = divmod(number, folds)
        fold_config = make_config({**as_dict(config), "seed": config.seed + number})
        metrics = finished_run(fold_config, directory / f"repeat-{repeat}-fold-{fold}", parts, progress)
        bags = {split: len(dataset) for split, dataset in parts.items()}
        entry = {key: metrics[key] for key in ("tasks", "mean_score", "seconds")}
        results.append({"repeat": repeat, "fold": fold, "bags": bags, **entry})
        report = _report(settings, results)
        if processes is None or processes.rank == 0:
            write_json(directory / "crossval.json", report)
    plain: dict[str, Any] = json_ready(report)
    return plain


def finished_run(
    config: RunConfig, place: Path, datasets: Mapping[str, BagDataset], progress: bool
) -> dict[str, Any]:
    """The content of metrics.json of the run at `place`, which is trained, or resumed, where it has none."""
    run = RunDirectory(place)

    def begun() -> tuple[dict[str, Any] | None, bool]:
        if run.metrics.is_file():
            return json.loads(run.metrics.read_text(encoding="utf-8")), False
        return None, run.config.is_file()

    metrics, resume = one_decides(processes_of(make_fabric(config)), begun)
    if metrics is not None:
        return metrics
    return train(config, place, resume=resume, datasets=datasets, progress=progress, plots=False).metrics


def check_settings(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Raise DataError if the report at `path`, if there is one, was made with other `settings`."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if before.get(key) != value:
            other = f"{key} {before.get(key)!r}" if key != "config" else "another configuration"
            raise DataError(f"{path.parent}: holds {what} with {other}; choose another --out")


def _report(settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tasks = {
        task: {metric: figures([r["tasks"][task][metric] for r in results]) for metric in metrics}
        for task, metrics in results[0]["tasks"].items()
    }
    scores = figures([r["mean_score"] for r in results])
    return {**settings, "tasks": tasks, "mean_score": scores, "results": list(results)}


def figures(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean, standard deviation of a sample, min, max and number (`folds`) of the finite values."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return {"mean": None, "std": None, "min": None, "max": None, "folds": 0}
    return {
        "mean": statistics.fmean(known),
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "min": min(known),
        "max": max(known),
        "folds": len(known),
    }
