"""One data set, several models, the same trainer and budget: a table of scores, seconds and parameters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from umda_fast.data import BagDataset
from umda_fast.files import json_ready, write_json, write_text
from umda_fast.runtime.config import ARCHITECTURES, ConfigError, RunConfig, as_dict, make_config
from umda_fast.runtime.provenance import stamped
from umda_fast.studies.crossval import check_settings, comparable, figures, finished_run
from umda_fast.studies.folds import kept_folds
from umda_fast.tasks import kind_of
from umda_fast.train.build import build_model
from umda_fast.train.data import load_data

__all__ = ["compare_models", "comparison_markdown"]


def model_config(config: RunConfig, architecture: str) -> RunConfig:
    """`config` for another architecture: model options that it has too stay, all others take their defaults.

    UMDA is trained as configured; the others, which are what people have without it, on the plain sum of the
    losses, and with nothing mixed in.
    """
    values = as_dict(config)
    known = {field.name for field in fields(ARCHITECTURES[architecture])}
    options = {name: value for name, value in values["model"].items() if name in known}
    if architecture != config.model.get("architecture", "umda"):
        options.pop("view", None)  # of the architecture that was configured
    values["model"] = {"architecture": architecture, **options}
    if architecture != "umda":
        values["sgl"] = {"balancer": "none"}
        if values["train"]["linear"] == "mix":
            values["train"]["linear"] = "beside"
    return make_config(values)


def compare_models(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    models: Sequence[str] = tuple(ARCHITECTURES),
    seeds: int = 3,
    folds: int | None = None,
    datasets: Iterable[Mapping[str, BagDataset]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train every model `seeds` times, or once on each of `folds` folds, with the same epochs, batches and optimiser.

    Args:
        config: of every run, but for the architecture; the i-th run of every model has the seed `config.seed + i`,
            and without `config.data.seed` it decides on split and draws too.
        out: holds `<model>/seed-<s>/` or `<model>/fold-<f>/` for every run, compare.json and compare.md, brought up
            to date after every run. What is finished there is not done again; a run that was stopped is resumed.
        models: names of architectures.
        datasets: for every seed or fold a mapping split -> bags, instead of `config.data.source`.
        progress: show progress on standard error.

    Returns:
        What compare.json holds: settings; `models`, for each name `parameters` and, over its runs, mean, std (of a
        sample), min and max of `mean_score`, `seconds` and each metric of each task.

    Raises:
        DataError: an unknown or repeated model, or `out` holds a comparison with other settings.
    """
    unknown = [name for name in models if name not in ARCHITECTURES]
    if unknown or not models or len(set(models)) != len(models):
        got = ", ".join(models) or "none"
        raise ConfigError(f"models: expected different names among {', '.join(ARCHITECTURES)}, got {got}")
    if folds is None and seeds < 1:
        raise ConfigError(f"seeds: expected at least 1, got {seeds}")
    directory = Path(out)
    settings = {
        "source": config.data.source,
        "folds": folds,
        "config": comparable(config),
    }
    check_settings(directory / "compare.json", settings, "a comparison")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    parameters: dict[str, int] = {}
    primary: dict[str, str] = {}
    report: dict[str, Any] = {}
    for number, parts in enumerate(_parts(config, directory, seeds, folds) if datasets is None else datasets):
        primary = primary or {task.name: kind_of(task).primary for task in parts["train"].tasks}
        for name in models:
            values = {**as_dict(model_config(config, name)), "seed": config.seed + number}
            run_config = make_config(values)
            place = directory / name / (f"seed-{run_config.seed}" if folds is None else f"fold-{number}")
            metrics, _ = finished_run(run_config, place, parts, progress)
            if name not in parameters:
                model = build_model(run_config, parts["train"])
                parameters[name] = sum(parameter.numel() for parameter in model.parameters())
            results[name].append({key: metrics[key] for key in ("seed", "tasks", "mean_score", "seconds")})
            report = stamped("compare", _report(settings, results, parameters, primary))
            write_json(directory / "compare.json", report)
            write_text(directory / "compare.md", comparison_markdown(report))
    plain: dict[str, Any] = json_ready(report)
    return plain


def _parts(
    config: RunConfig, directory: Path, seeds: int, folds: int | None
) -> Iterable[Mapping[str, BagDataset]]:
    if folds is not None:
        yield from kept_folds(config, directory, folds, 1)
        return
    for number in range(seeds):
        yield load_data(make_config({**as_dict(config), "seed": config.seed + number}))


def _report(
    settings: Mapping[str, Any],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    parameters: Mapping[str, int],
    primary: Mapping[str, str],
) -> dict[str, Any]:
    models = {}
    for name, runs in results.items():
        if not runs:
            continue
        models[name] = {
            "parameters": parameters[name],
            "mean_score": figures([run["mean_score"] for run in runs]),
            "seconds": figures([run["seconds"] for run in runs]),
            "tasks": {
                task: {metric: figures([run["tasks"][task][metric] for run in runs]) for metric in metrics}
                for task, metrics in runs[0]["tasks"].items()
            },
            "runs": list(runs),
        }
    return {**settings, "primary": dict(primary), "models": models}


def comparison_markdown(report: Mapping[str, Any]) -> str:
    """The table of a comparison: mean and standard deviation over the runs; the best mean of a column in bold."""
    columns = {"mean score": ("", "")} | {f"{task} ({m})": (task, m) for task, m in report["primary"].items()}

    def of(model: Mapping[str, Any], title: str) -> Mapping[str, Any]:
        task, metric = columns[title]
        found: Mapping[str, Any] = model["tasks"][task][metric] if task else model["mean_score"]
        return found

    means = {title: [of(model, title)["mean"] for model in report["models"].values()] for title in columns}
    best = {title: max((m for m in known if m is not None), default=None) for title, known in means.items()}
    titles = ["model", *columns, "seconds", "parameters"]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for name, model in report["models"].items():
        cells = [name]
        for title in columns:
            value = of(model, title)
            bold = value["mean"] is not None and value["mean"] == best[title]
            cells.append(f"**{_cell(value)}**" if bold else _cell(value))
        cells += [_cell(model["seconds"], 1), f"{model['parameters']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, Any], digits: int = 4) -> str:
    if value["mean"] is None:
        return "-"
    spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"
