"""A run read back from its directory: its configuration, and the model with the best weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from umda_fast.errors import DataError
from umda_fast.model import UMDA, Ensemble
from umda_fast.model.baselines import BASELINES
from umda_fast.model.mixture import with_members
from umda_fast.model.readout import Readout
from umda_fast.runtime.config import (
    ConfigError,
    RunConfig,
    as_dict,
    load_run_config,
    make_config,
    override_values,
)
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.train.split_record import SplitRecord

__all__ = ["Run", "configured", "load_ensemble", "load_run", "run_config"]


@dataclass
class Run:
    """A run read back from its directory; or several as one, `members`: the model is then an `Ensemble`, directory and
    configuration are those of the first.

    `record` is its splits.csv, None where an earlier version left none. `options` are laid over those of the source,
    also of another source than the run's own. `told` is what was said of its bags already.
    """

    directory: Path
    config: RunConfig
    model: Any
    members: tuple[Run, ...] = ()
    record: SplitRecord | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list, repr=False)

    @property
    def each(self) -> tuple[Run, ...]:
        """The members, or the one run that it is."""
        return self.members or (self,)

    @property
    def notes(self) -> list[str]:
        """What was said of the bags that it was used on: which are new or gone, and which were left out and why."""
        return list(dict.fromkeys(line for run in (self, *self.members) for line in run.told))


def load_run(directory: str | os.PathLike[str]) -> Run:
    """The configuration and the model (best weights, evaluation mode, on the CPU) of a run directory; with
    `train.linear: mix` a `Mixture`, if any of the linear model is in it.

    Raises:
        DataError: it is no run directory, or its files cannot be read.
    """
    run = RunDirectory.existing(directory)
    config = load_run_config(run.config)
    try:
        # Not the configuration's: a model with new heads keeps that of its trunk.
        architecture = json.loads((run.path / "config.json").read_text(encoding="utf-8"))["architecture"]
        kind: Any = {**BASELINES, "readout": Readout}.get(architecture, UMDA)
        model = with_members(kind.from_pretrained(run.path), run.path)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise DataError(
            f"{run.path}: the model cannot be read: {' '.join(str(error).split())[:300]}"
        ) from None
    record = SplitRecord.read(run.splits) if run.splits.is_file() else None
    return Run(run.path, config, model.eval(), record=record)


def load_ensemble(directories: Sequence[str | os.PathLike[str]]) -> Run:
    """Several runs as one, which predicts the mean of what they predict (see `Ensemble`).

    Raises:
        DataError: one cannot be read, or is for other views or tasks than the first.
    """
    runs = tuple(load_run(directory) for directory in directories)
    try:
        model = Ensemble([run.model for run in runs])
    except ValueError as error:
        raise DataError(f"{', '.join(str(run.directory) for run in runs)}: {error}") from None
    return Run(runs[0].directory, runs[0].config, model.eval(), runs, runs[0].record)


# What of the configuration of a trained model may be said anew: how bags are read, and in what precision.
_SETTABLE = ("data.budget", "data.workers", "precision")


def configured(run: Run, overrides: Sequence[str] = ()) -> Run:
    """`run` with `--set`-style overrides: `data.options.<name>` of the source it is used on, and how bags are read.

    Raises:
        ConfigError: a key that a trained model keeps, or a wrong value.
    """
    values = as_dict(run.config)
    options = dict(run.options)
    for override in overrides:
        key = override.partition("=")[0].strip()
        said = override_values([override])
        if key in _SETTABLE:
            values["data"] |= said.pop("data", {})
            values |= said
        elif key.startswith("data.options."):
            options |= said["data"]["options"]
        else:
            raise ConfigError(
                f"--set {override}: a trained model keeps its configuration; expected data.options.<name> or one of "
                f"{', '.join(_SETTABLE)}"
            )
    return replace(run, config=make_config(values), options=options)


def run_config(directory: str | os.PathLike[str], values: Mapping[str, Any]) -> RunConfig:
    """The configuration of the run in `directory`, with `values` laid over it, to resume it.

    Raises:
        DataError: there is no run.
    """
    run = RunDirectory(directory)
    if not run.config.is_file():
        raise DataError(f"{run.path}: holds no run to resume (no {run.config.name})")
    return load_run_config(run.config, values)
