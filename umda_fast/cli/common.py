"""How several commands begin and end. Everything heavy is imported inside."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umda_fast.cli.options import Bags, Computing, Configuration, TrainedOn

if TYPE_CHECKING:
    from umda_fast.runtime.config import RunConfig
    from umda_fast.train import Run

__all__ = [
    "check_outputs",
    "directory_of",
    "load_runs",
    "load_settings",
    "named",
    "number",
    "save_json",
    "source_options",
    "values",
    "whole_numbers",
]


def values(
    bags: Bags, computing: Computing, *, seed: int | None, epochs: int | None, skip_bad: bool = False
) -> dict[str, Any]:
    """The part of a configuration that options of their own stand for; what was not given is absent."""
    data = {"source": bags.data, "format": bags.format, "options": {"skip_bad": skip_bad or None}}
    computed = {**computing.given(), "seed": seed}
    return _given({**computed, "data": data, "train": {"epochs": epochs}})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    pruned = {key: _given(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in pruned.items() if value is not None and value != {}}


def load_settings(configuration: Configuration, given: dict[str, Any]) -> RunConfig:
    """The defaults, under the file of `--config`, under `--set`, under `given` (`values`)."""
    from umda_fast.train import load_config

    return load_config(configuration.config, configuration.set_ or (), given)


def directory_of(command: str, out: Path | None, settings: RunConfig) -> Path:
    """`--out`, or a new directory under runs/ named after the command, the data and the time."""
    if out is not None:
        return out
    stem = Path(settings.data.source).stem or "data"
    return Path("runs") / f"{command}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def load_runs(runs: Sequence[Path], use: TrainedOn) -> Run:
    """One run, or several as one that predicts the mean of what they predict, with what `--set` says."""
    from umda_fast.train import load_ensemble, load_run
    from umda_fast.train.loading import configured

    return configured(load_run(runs[0]) if len(runs) == 1 else load_ensemble(runs), use.set_ or ())


def source_options(set_: Sequence[str] | None, skip_bad: bool) -> dict[str, Any]:
    """The options of the source among `--set` values, for a command to which nothing else of a configuration
    matters."""
    options: dict[str, Any] = {}
    if set_:
        from umda_fast.train import load_config

        options = load_config(overrides=set_).data.options
    return {**options, "skip_bad": True} if skip_bad else options


def check_outputs(*files: Path | None) -> None:
    """Raise DataError for the first file that could not be written, before anything is computed for it."""
    from umda_fast.errors import DataError

    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{file}: its folder cannot be made: {error.strerror or error}") from None
        if file.is_dir():
            raise DataError(f"{file}: expected a file, got a directory")
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise DataError(f"{file}: expected a folder that may be written in")


def save_json(path: Path | None, name: str, result: Mapping[str, Any]) -> None:
    """What `--json` asks for, under the schema of that name."""
    if path is not None:
        from umda_fast.files import write_json
        from umda_fast.runtime.provenance import stamped

        write_json(path, stamped(name, result))


def named(names: str | None) -> list[str] | None:
    """The names of an option that takes several, separated by commas; None where it was not given."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def numbers(option: str, texts: str | None) -> list[float] | None:
    """The numbers of an option that takes several, separated by commas; None where it was not given."""
    from umda_fast.errors import DataError

    try:
        return None if texts is None else [float(text) for text in texts.split(",")]
    except ValueError:
        raise DataError(f"{option}: expected numbers with commas between them, got {texts!r}") from None


def whole_numbers(option: str, given: Sequence[float]) -> list[int]:
    """`given` as integers."""
    from umda_fast.errors import DataError

    for value in given:
        if not float(value).is_integer():
            raise DataError(f"{option}: expected whole numbers, got {value:g}")
    return [int(value) for value in given]


def number(value: float | None) -> str:
    return "undefined" if value is None or value != value else f"{value:.4f}"
