"""Which configuration a kernel is launched in: the pinned one, or one measured on this GPU when somebody
asked for that.

``umda_fast.kernels.tune`` measures and writes; here the result is read, once per process. Keys name what a
kernel is compiled for and never a number of instances or tokens, so that no length brings a new
compilation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from umda_fast.errors import DataError
from umda_fast.files import cache_folder, write_text

__all__ = ["Config", "configured", "measured", "pinned_configurations", "trying", "tuning_file", "write"]


@dataclass(frozen=True)
class Config:
    """Tile sizes by the names a kernel knows them by, warps per program, most registers per thread."""

    tile: dict[str, int]
    num_warps: int
    max_registers: int | None = None


_trying: dict[str, Config] = {}
_asked: list[dict[str, Config]] = []


def tuning_file() -> Path:
    """``$UMDA_FAST_TUNING``, else ``umda_fast/tuning.json`` in the user's cache folder."""
    if "UMDA_FAST_TUNING" in os.environ:
        return Path(os.environ["UMDA_FAST_TUNING"])
    return cache_folder() / "tuning.json"


def _machine(device: torch.device) -> str:
    """Measurements of another GPU or another Triton say nothing about this one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}"


def _read(file: Path) -> dict[str, dict[str, Config]]:
    """GPU and Triton -> key -> configuration."""
    if not file.exists():
        return {}
    try:
        table = json.loads(file.read_text())
        return {machine: {key: Config(**value) for key, value in keys.items()} for machine, keys in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: expected what umda-fast tune writes, got {error}; remove it to start anew") from error


@functools.lru_cache(maxsize=8)
def _measured(file: Path, machine: str) -> dict[str, Config]:
    return _read(file).get(machine, {})


@functools.lru_cache(maxsize=8)
def _table(device: torch.device) -> dict[str, Config]:
    return _measured(tuning_file(), _machine(device))


def configured(device: torch.device, key: str, pinned: Config) -> Config:
    """The configuration being tried for ``key``, else the one measured on ``device``, else ``pinned``."""
    for asked in _asked:
        asked[key] = pinned
    if key in _trying:
        return _trying[key]
    if device.type == "meta":
        return pinned
    return _table(device).get(key, pinned)


@contextlib.contextmanager
def pinned_configurations() -> Iterator[dict[str, Config]]:
    """Collects what is pinned for every key that a kernel asks for inside."""
    asked: dict[str, Config] = {}
    _asked.append(asked)
    try:
        yield asked
    finally:
        _asked.remove(asked)


def measured() -> dict[str, dict[str, Config]]:
    """What `tuning_file` holds: GPU and Triton -> key -> configuration.

    Raises:
        DataError: something else is in it.
    """
    return _read(tuning_file())


@contextlib.contextmanager
def trying(key: str, config: Config) -> Iterator[None]:
    """``configured`` answers ``config`` for ``key`` inside."""
    _trying[key] = config
    try:
        yield
    finally:
        del _trying[key]


def write(device: torch.device, key: str, config: Config) -> None:
    """Keeps ``config`` for ``key`` on ``device``, for this process and later ones."""
    file = tuning_file()
    table = {machine: {k: asdict(c) for k, c in keys.items()} for machine, keys in _read(file).items()}
    table.setdefault(_machine(device), {})[key] = asdict(config)
    write_text(file, json.dumps(table, indent=1, sort_keys=True) + "\n")  # readers see the old table or the new one
    _measured.cache_clear()
    _table.cache_clear()
