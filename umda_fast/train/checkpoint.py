"""The checkpoint of a training: what it holds, written whole or not at all, read back, and checked to be of the same
run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from umda_fast.errors import DataError
from umda_fast.files import save_torch
from umda_fast.runtime.config import ConfigError, RunConfig, as_dict, complete_run_config
from umda_fast.runtime.random_state import rank_seed, set_random_state

__all__ = ["CHECKPOINT_VERSION", "Checkpoint", "TrainingState", "check_same_run"]

CHECKPOINT_VERSION = 2


@dataclass
class TrainingState:
    """Where a training stands.

    Attributes:
        epoch: the one that is being trained, or comes next.
        step: updates so far; step_in_epoch: of this epoch.
        instances: trained on so far, and train_seconds: the time that took.
        total_seconds: with validation, of all processes that worked on the run one after another.
        sums: of this epoch, for each figure of a step its sum and of how many steps.
        best_score: the best on the validation split, by `train.select`, -inf before the first.
        best_epoch: the epoch whose weights are the best, -1 before the first; best_weights: these, on the CPU.
        finished: the last epoch is done, or training stopped early.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    instances: int = 0
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)
    best_score: float = -math.inf
    best_epoch: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    finished: bool = False

    @property
    def instances_per_second(self) -> float:
        """Of training, without validation."""
        return self.instances / max(self.train_seconds, 1e-9)

    def add(self, values: Mapping[str, float]) -> None:
        """Take the figures of a step into those of the epoch."""
        for name, value in values.items():
            entry = self.sums.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += 1.0

    def means(self) -> dict[str, float]:
        """The epoch's figures: of each the mean over the steps that had it."""
        return {name: total / count for name, (total, count) in self.sums.items()}

    def offer(self, score: float, weights: Mapping[str, Tensor]) -> bool:
        """Keep a copy of `weights` if the epoch's `score` is the best so far; returns whether it is.

        Without a score (NaN) the last weights are the best known.
        """
        scored = math.isfinite(score)
        if scored and score <= self.best_score:
            return False
        if scored:
            self.best_score = score
        self.best_epoch = self.epoch
        self.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
        return True


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on bit for bit, on any number of processes.

    Attributes:
        config: of the run, as plain values.
        model, optimizer, sgl, average: `state_dict` of each; None for what the run does without.
        recent: the bags that `RiskSets` remembers, of tasks that it has.
        random: for each process the states of its random generators.
        sampler: the settings that the order of the bags follows from.
        state: where the training stands.
        log_offset: length in bytes of metrics.jsonl up to here.
    """

    config: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    sgl: dict[str, Any] | None
    average: dict[str, Any] | None
    recent: dict[str, Any]
    random: list[dict[str, Any]]
    sampler: dict[str, Any]
    state: TrainingState
    log_offset: int

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        content = {name: value for name, value in vars(self).items() if name != "state"}
        save_torch(path, {"version": CHECKPOINT_VERSION, **content, **vars(self.state)})

    @classmethod
    def read(cls, path: str | os.PathLike[str], config: RunConfig) -> Checkpoint:
        """The file's content, on the CPU, for a run of `config`.

        Raises:
            DataError: it is no checkpoint, or of another version.
            ConfigError: it is of a run that was configured otherwise, in more than a resumed run may change.
        """
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            version = found["version"]
        except Exception as error:
            raise DataError(f"{path}: not a checkpoint: {' '.join(str(error).split())[:200]}") from None
        if version != CHECKPOINT_VERSION:
            raise DataError(f"{path}: version {version}, expected {CHECKPOINT_VERSION}")
        own = [item.name for item in fields(cls) if item.name != "state"]
        of_state = [item.name for item in fields(TrainingState)]
        found.setdefault("recent", {})  # a file from before there were such tasks
        missing = [name for name in (*own, *of_state) if name not in found]
        if missing:
            raise DataError(f"{path}: not a checkpoint: {', '.join(missing)} missing")
        check_same_run(as_dict(config), _completed(found["config"]))
        state = TrainingState(**{name: found[name] for name in of_state})
        return cls(state=state, **{name: found[name] for name in own})

    def restore_random_state(self, seed: int, rank: int) -> None:
        """Put the random generators of process `rank` to where they were; one that had no part in the checkpoint draws
        new numbers, from `seed`."""
        if rank < len(self.random):
            set_random_state(self.random[rank])
        else:
            Fabric.seed_everything(rank_seed(seed, rank, self.state.step), verbose=False)


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with all keys that came to be since it was written."""
    try:
        return complete_run_config(config)
    except ConfigError:  # it has a key that is no more, which the comparison names
        return config


# What may change when a run is resumed; everything else decides what the weights become.
_CHANGEABLE = (
    "device",
    "backend",
    "strict_backend",
    "data.paths",
    "data.workers",
    "train.epochs",
    "train.steps",
    "train.patience",
    "train.checkpoint_steps",
    "train.log_steps",
)


def check_same_run(now: Mapping[str, Any], then: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ConfigError naming the first key whose value must not differ from the checkpoint's."""
    for key in sorted(now.keys() | then.keys()):
        name = prefix + key
        if name in _CHANGEABLE:
            continue
        here, there = now.get(key), then.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            check_same_run(here, there, f"{name}.")
        elif here != there:
            raise ConfigError(
                f"{name}: a resumed run keeps its configuration; expected {there!r}, got {here!r}"
            )
