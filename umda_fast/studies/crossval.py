"""Cross-validation: a run directory for each fold, so that it can be stopped and continued at any point."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.files import json_ready, write_json
from umda_fast.runtime.config import ConfigError, RunConfig, as_dict, complete_run_config, make_config
from umda_fast.runtime.fabric import make_fabric, processes_of
from umda_fast.runtime.provenance import stamped
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.runtime.together import one_decides
from umda_fast.studies.folds import kept_folds
from umda_fast.studies.out_of_fold import FoldOutputs, fold_outputs, pooled_metrics, write_out_of_fold
from umda_fast.train.recorded import check_recorded
from umda_fast.train.run import train

__all__ = ["check_settings", "comparable", "cross_validate", "figures", "finished_run", "over_folds", "pooled"]


# Who computes is no part of what is computed.
_NOT_COMPARED = {"device": None, "backend": None, "strict_backend": None}


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
        out: holds `repeat-R-fold-F/` for each run, folds.csv with the bags of every fold, out_of_fold.csv with what is
            predicted for test bags, and crossval.json, brought up to date after every fold. What is finished there is
            not done again, and a run that was stopped is resumed; the folds stay, whatever the data has become.
        datasets: `folds * repeats` mappings split -> bags (train, test and, if there, val), repeat by repeat,
            instead of the folds of `config.data.source`.
        progress: show progress on standard error.

    Returns:
        What crossval.json holds: settings; `results`, one entry for each fold; for `mean_score` and each
        metric of each task `mean`, `std` (of a sample), `min`, `max` and `folds`, over the folds in which it
        is defined; `pooled`, for each repeat the metrics over the test bags of all its folds as one set.

    Raises:
        DataError: too many folds, or `out` holds a cross-validation with other settings, or on bags that are gone.
    """
    processes = processes_of(make_fabric(config))
    directory = Path(out if processes is None else processes.object_from_first(os.fspath(out)))
    settings: dict[str, Any] = {
        "source": config.data.source,
        "folds": folds,
        "repeats": repeats,
        "config": comparable(config),
    }
    one_decides(processes, lambda: check_settings(directory / "crossval.json", settings, "a cross-validation"))
    if datasets is None:
        datasets = kept_folds(config, directory, folds, repeats, processes)
    results: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    outputs: dict[tuple[int, int], FoldOutputs] = {}
    for number, parts in enumerate(datasets):
        if number == 0:
            settings["specs"] = {task.name: [task.kind, *task.class_names] for task in parts["train"].tasks}
            one_decides(processes, lambda: check_settings(directory / "crossval.json", settings, "a cross-validation"))
        repeat, fold = divmod(number, folds)
        fold_config = make_config({**as_dict(config), "seed": config.seed + number})
        place = directory / f"repeat-{repeat}-fold-{fold}"
        metrics, model = finished_run(fold_config, place, parts, progress)
        if len(parts.get("test", ())):
            found = fold_outputs(fold_config, place, parts["test"], model)
            outputs |= {} if found is None else {(repeat, fold): found}
        bags = {split: len(dataset) for split, dataset in parts.items()}
        entry = {key: metrics[key] for key in ("tasks", "mean_score", "seconds")}
        results.append({"repeat": repeat, "fold": fold, "bags": bags, **entry})
        report = one_decides(processes, partial(stamped, "crossval", _report(settings, results)))
        if processes is None or processes.rank == 0:
            write_json(directory / "crossval.json", report)
    report["pooled"] = pooled(outputs, folds, repeats)
    if outputs and (processes is None or processes.rank == 0):
        write_out_of_fold(directory / "out_of_fold.csv", outputs)
        write_json(directory / "crossval.json", report)
    plain: dict[str, Any] = json_ready(report)
    return plain


def finished_run(
    config: RunConfig, place: Path, datasets: Mapping[str, BagDataset], progress: bool
) -> tuple[dict[str, Any], Any]:
    """The content of metrics.json of the run at `place`, which is trained, or resumed, where it has none; and its
    model, None where it was there already.

    Raises:
        DataError: it was trained on other bags.
    """
    run = RunDirectory(place)

    def begun() -> tuple[dict[str, Any] | None, bool]:
        if run.metrics.is_file():
            return json.loads(run.metrics.read_text(encoding="utf-8")), False
        return None, run.config.is_file()

    metrics, resume = one_decides(processes_of(make_fabric(config)), begun)
    if metrics is not None:
        check_recorded(run, datasets)
        bags = {split: len(dataset) for split, dataset in datasets.items()}
        if bags != metrics["data"]["bags"]:  # a run of before, which recorded no more than this
            raise DataError(f"{place}: bags: expected {metrics['data']['bags']}, got {bags}; choose another --out")
        return metrics, None
    result = train(config, place, resume=resume, datasets=datasets, progress=progress, plots=False)
    return result.metrics, result.model


def comparable(config: RunConfig) -> dict[str, Any]:
    """What two runs must have in common to be of one study, as JSON has it: all but who computes it."""
    settings: dict[str, Any] = json_ready({**as_dict(config), **_NOT_COMPARED})
    return settings


def check_settings(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Raise DataError if the report at `path`, if there is one, was made with other `settings`."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        then = before.get(key, value)
        if key == "config":
            then = _completed(then)
        if then != value:
            other = f"{key} {then!r}" if key != "config" else "another configuration"
            raise DataError(f"{path.parent}: holds {what} with {other}; choose another --out")


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A report's configuration with the keys that came to be since."""
    with contextlib.suppress(ConfigError):
        whole = {**config, "device": "auto", "backend": "auto", "strict_backend": False}
        plain: dict[str, Any] = json_ready(complete_run_config(whole))
        return {**plain, **_NOT_COMPARED}
    return config


def pooled(outputs: Mapping[tuple[int, int], FoldOutputs], folds: int, repeats: int) -> list[dict[str, Any]]:
    """`pooled_metrics` of every repeat all of whose folds left outputs."""
    found = []
    for repeat in range(repeats):
        runs = [outputs[repeat, fold] for fold in range(folds) if (repeat, fold) in outputs]
        if len(runs) == folds:
            found.append({"repeat": repeat, **pooled_metrics(runs)})
    return found


def _report(settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {**settings, **over_folds(results), "results": list(results)}


def over_folds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`figures` of the `mean_score` and of each metric of the `tasks` of several runs."""
    tasks = {
        task: {metric: figures([r["tasks"][task][metric] for r in results]) for metric in metrics}
        for task, metrics in results[0]["tasks"].items()
    }
    return {"tasks": tasks, "mean_score": figures([r["mean_score"] for r in results])}


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
