"""A small search over the few settings that are worth choosing for each data set, and an honest score of searching.

Nested cross-validation, because the score by which a configuration was chosen is too good a score for it (Varma and
Simon, "Bias in error estimation when using cross-validation for model selection", 2006): for each outer fold inner
folds of its training part choose, and the chosen configuration is measured on the outer fold, which had no say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from umda_fast.data import Splits
from umda_fast.data.arrays import IntArray
from umda_fast.data.splits import check_folds, held_out, k_fold
from umda_fast.errors import DataError
from umda_fast.extras import require
from umda_fast.files import json_ready, write_json
from umda_fast.runtime.config import ARCHITECTURES, ConfigError, RunConfig, as_dict, dump_config, make_config
from umda_fast.runtime.fabric import make_fabric, processes_of
from umda_fast.runtime.guard import NonFiniteError
from umda_fast.runtime.provenance import stamped
from umda_fast.studies.crossval import check_settings, comparable, figures, finished_run, over_folds, pooled
from umda_fast.studies.folds import kept_folds
from umda_fast.studies.out_of_fold import FoldOutputs, fold_outputs
from umda_fast.studies.trials import Chosen, Value, choose
from umda_fast.train.chosen import data_seed
from umda_fast.train.data import load_data

__all__ = ["BEST", "CHOICES", "FILE", "choices_of", "inner_folds", "search"]

FILE, BEST, JOURNAL = "search.json", "best.yaml", "optuna.log"

CHOICES: Mapping[str, tuple[Value, ...]] = {
    "train.lr": (5e-4, 1e-3, 2e-3, 4e-3),
    "model.dropout": (0.0, 0.1, 0.25, 0.5),
    "train.weight_decay": (0.0, 0.01, 0.05, 0.2),
    "model.hcva": (True, False),
    "model.graph": (True, False),
}
"""What is chosen from by dotted key, beside what is configured: step and regularisation, for which data sets of
different sizes differ most, and the two blocks that cost most. More choices would need more bags than there are."""

_MEASURED = ("tasks", "mean_score", "skill", "seconds")


def search(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    trials: int = 20,
    folds: int = 5,
    inner: int = 3,
    over: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Choose a configuration for training, and measure what choosing so is worth.

    A configuration is scored by the mean, over `inner` folds of training bags, of the skill (docs/training.md) on the
    bags left out; the first one tried is `config`. This is done in the training part of each of `folds` outer folds,
    and what it chose there, and `config`, are trained on that part and measured on the fold. Then it is done once more
    on the bags that `train` would train on and validate with; what that chooses is written to best.yaml, and the test
    bags of `train` have had no say in it.

    Args:
        config: of every run, but for what is chosen. The bags must not be drawn by a seed.
        out: holds `fold-F/` and `final/` with the runs under names of their configurations, folds.csv, optuna.log (the
            journal of the trials), best.yaml (with the seed of its split) and search.json, brought up to date after
            every fold. Begun again it goes on: finished runs and trials are not done again, and what is still to be
            tried is what an uninterrupted search would have tried.
        trials: different configurations tried in each fold, `config` among them.
        folds, inner: at least 2.
        over: keys of `CHOICES`; None: all that the architecture has, and `model.hcva` with several views only.
        progress: a line for each trial, and the progress of outer runs, on standard error.

    Returns:
        What search.json holds: settings, and `choices` of every key; `results`, for each outer fold `chosen`, `trials`
        (`values` and `score`, None of a training that diverged), and under `searched` and `given` what was measured
        on its test bags; over the folds, under the same names, mean, standard deviation, least and most of `skill`,
        `mean_score` and each metric, and `pooled` over all test bags as one set; `best`, what was chosen at the end.

    Raises:
        MissingExtraError: without Optuna.
        DataError: a number or key that cannot be, too few bags, bags drawn by a seed, or `out` holds a search with
            other settings, or on bags that are gone.
    """
    require("search", "optuna")
    for name, value, least in (("trials", trials, 2), ("folds", folds, 2), ("inner", inner, 2)):
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
    if processes_of(make_fabric(config)) is not None:
        raise ConfigError("search: runs in one process; start it without torchrun")
    directory = Path(out)
    final = _of_files(load_data(config))
    final.check()
    choices = choices_of(config, over, len(final.views))
    settings: dict[str, Any] = json_ready(
        {
            "source": config.data.source,
            "trials": trials,
            "folds": folds,
            "inner": inner,
            "choices": choices,
            "config": comparable(config),
            "specs": {task.name: [task.kind, *task.class_names] for task in final.tasks},
        }
    )
    check_settings(directory / FILE, settings, "a search")
    last = inner_folds(final, config, inner, folds)
    outer = [_of_files(fold) for fold in kept_folds(config, directory, folds, 1)]
    within = [inner_folds(fold, config, inner, number) for number, fold in enumerate(outer)]

    report = _report(settings, [], {}, None)
    write_json(directory / FILE, report)
    results: list[dict[str, Any]] = []
    outputs: dict[str, dict[tuple[int, int], FoldOutputs]] = {"searched": {}, "given": {}}
    for number, fold in enumerate(outer):
        place = directory / f"fold-{number}"
        chosen = _chosen(config, place, choices, trials, within[number], number, progress)
        result: dict[str, Any] = {"fold": number, "bags": {split: len(part) for split, part in fold.items()}}
        result |= {"chosen": chosen.best, "trials": chosen.listed()}
        for name, values in (("searched", chosen.best), ("given", {})):
            run = configured(config, values, config.seed + number)
            at = place / "outer" / called({**chosen.given, **values})
            metrics, model = finished_run(run, at, fold, progress)
            result[name] = {key: metrics[key] for key in _MEASURED}
            found = fold_outputs(run, at, fold.test, model)
            outputs[name] |= {} if found is None else {(0, number): found}
        results.append(result)
        report = _report(settings, results, outputs, None)
        write_json(directory / FILE, report)
    chosen = _chosen(config, directory / "final", choices, trials, last, folds, progress)
    report = _report(settings, results, outputs, chosen)
    best = as_dict(configured(config, chosen.best, config.seed))
    best["data"]["seed"] = data_seed(config)  # with any seed of a training the test bags are those that had no say
    dump_config(make_config(best), directory / BEST)
    write_json(directory / FILE, report)
    plain: dict[str, Any] = json_ready(report)
    return plain


def choices_of(config: RunConfig, over: Sequence[str] | None, views: int) -> dict[str, tuple[Value, ...]]:
    """What is chosen from, by key, what is configured first.

    Args:
        over: keys of `CHOICES`; None: all that fit. views: of the data.

    Raises:
        ConfigError: an unknown key, or one twice, or none, or one without a meaning for this model and data.
    """
    known = {field.name for field in fields(ARCHITECTURES[config.model["architecture"]])}
    fitting = [key for key in CHOICES if not key.startswith("model.") or key.partition(".")[2] in known]
    if views < 2 and "model.hcva" in fitting:
        fitting.remove("model.hcva")  # it is attention between views
    keys = fitting if over is None else list(over)
    if not keys or len(set(keys)) < len(keys) or not set(keys) <= set(fitting):
        got = ", ".join(keys) or "none"
        of = f"{config.model['architecture']} with {views} view{'s' * (views > 1)}"
        raise ConfigError(f"over: expected different keys among {', '.join(fitting)} (for {of}), got {got}")
    values = as_dict(config)
    found = {}
    for key in keys:
        section, _, name = key.partition(".")
        given = values[section][name]
        others = (True, False) if given != "auto" else (False,)  # `auto` of several views is True
        choices = CHOICES[key] if key != "model.hcva" else others
        found[key] = (given, *(choice for choice in choices if choice != given))
    return found


def inner_folds(split: Splits, config: RunConfig, inner: int, number: int) -> list[Splits]:
    """The bags of `split` that are not for testing, cut into `inner` folds, stratified and by patient like all others:
    in each, those of the fold are `test`, and of the rest as large a share is for validation as in `split`.

    Raises:
        DataError: there are fewer bags, or patients, than folds.
    """
    at = {name: row for row, name in enumerate(split.whole.names)}
    rows: IntArray = np.array(sorted(at[name] for part in (split.train, split.val) for name in part.names), np.int64)
    groups = None if split.groups is None else [split.groups[row] for row in rows.tolist()]
    pool = split.whole.subset(rows)
    check_folds(f"{split.name}: inner", inner, 1, len(rows) if groups is None else len(set(groups)))
    seed, share = data_seed(config) + number, len(split.val) / len(rows)
    found = []
    for cut in k_fold(pool, inner, 1, seed, groups):
        kept = held_out(split.whole, rows[cut.train], share, seed + cut.fold, split.groups)
        found.append(split.divided({**kept, "test": rows[cut.test]}))
    return found


def _of_files(split: Any) -> Splits:
    if not isinstance(split, Splits) or split.drawn:
        raise DataError(
            "search: expected data of files, got bags drawn by a seed, whose instances would be in several inner folds"
        )
    return split


def configured(config: RunConfig, values: Mapping[str, Value], seed: int, **train: Any) -> RunConfig:
    """`config` with `values` by dotted key, another seed, and values of the section `train`."""
    plain = as_dict(config)
    for key, value in values.items():
        section, _, name = key.partition(".")
        plain[section][name] = value
    return make_config({**plain, "seed": seed, "train": {**plain["train"], **train}})


def called(values: Mapping[str, Value]) -> str:
    """The name of a configuration's folder: no two that differ share one, whatever trial tried them."""
    return "_".join(f"{key.partition('.')[2]}-{value}" for key, value in values.items())


def _chosen(
    config: RunConfig,
    place: Path,
    choices: Mapping[str, tuple[Value, ...]],
    trials: int,
    parts: Sequence[Splits],
    number: int,
    progress: bool,
) -> Chosen:
    """What the inner folds `parts` choose."""

    def score(values: Mapping[str, Value]) -> float | None:
        """The mean skill on the bags left out; None if a training diverged."""
        skills = []
        for fold, part in enumerate(parts):
            # The same seed whatever is tried: configurations differ by what they are, not by their initial weights.
            run = configured(config, values, config.seed + fold, keep="scores")
            try:
                metrics, _ = finished_run(run, place / "inner" / called(values) / f"inner-{fold}", part, False)
            except NonFiniteError:
                return None
            skills.append(metrics["skill"]["mean"])
        mean = figures(skills)["mean"]
        if mean is None:
            raise DataError(f"{place.name}: no inner fold has labels to choose by; take fewer with --inner")
        return mean

    def tell(tried: int, values: Mapping[str, Value], value: float | None) -> None:
        if progress:
            said = "diverged" if value is None else f"skill {value:.4f}"
            print(f"{place.name}: {tried} of {trials}: {called(values)}: {said}", file=sys.stderr)

    journal = place.parent / JOURNAL
    return choose(score, choices, trials, journal=journal, study=place.name, seed=(config.seed, number), tell=tell)


def _report(
    settings: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    outputs: Mapping[str, Mapping[tuple[int, int], FoldOutputs]],
    final: Chosen | None,
) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for name in ("searched", "given"):
        runs = [result[name] for result in results]
        whole[name] = None
        if runs:
            whole[name] = {
                "skill": figures([run["skill"]["mean"] for run in runs]),
                **over_folds(runs),
                "pooled": next(iter(pooled(outputs[name], settings["folds"], 1)), None),
            }
    best = None if final is None else {"chosen": final.best, "trials": final.listed()}
    return stamped("search", {**settings, **whole, "results": list(results), "best": best})
