"""A profile of training steps without a training: warm steps on the configured data, and nothing that remains of them
but the table and the trace."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from umda_fast.data import BagBatch, BagDataset
from umda_fast.profiling import StepProfile
from umda_fast.runtime.config import ConfigError, RunConfig
from umda_fast.runtime.fabric import make_fabric
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.train.build import build_model
from umda_fast.train.data import training_data
from umda_fast.train.run import computing
from umda_fast.train.trainer import Trainer

__all__ = ["profile_steps"]


def profile_steps(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    steps: int = 5,
    datasets: Mapping[str, BagDataset] | None = None,
    encoders: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Take training steps as `train` would, and write where their time goes: `profile.json`, `trace.json.gz`.

    Args:
        config: of a run.
        out: the directory for both; must not hold a run.
        steps: that are timed; as many more are counted, some before to warm up.
        datasets, encoders: as of `train`.

    Returns:
        The table of the step (docs/profiling.md), as profile.json has it.

    Raises:
        DataError, ConfigError: the configuration, the directory or the data cannot be used; `steps` < 1; a model that
        is fitted, not trained.
    """
    if steps < 1:
        raise ConfigError(f"steps: expected at least 1, got {steps}")
    fabric = make_fabric(config)
    run = RunDirectory(out)
    run.begin(resume=False)
    config, datasets = training_data(config, datasets)
    with computing(config, fabric):
        Fabric.seed_everything(config.seed, verbose=False)
        model = build_model(config, datasets["train"], encoders)
        profile = StepProfile(steps, fabric.device, run.path)
        trainer = Trainer(config, model, datasets, run, fabric, progress=False, profile=profile)
        if trainer.fitted:
            raise ConfigError("model.architecture: linear is fitted at once, and takes no steps to profile")
        trainer.train_step.model.train()
        with profile.whole():
            for number, drawn in enumerate(profile.steps(_batches(trainer))):
                # The middle of a training: of its learning rate, and of what fades out on the way.
                trainer.train_step(trainer.prepare(drawn, 0), 0.5, number)
                if profile.missing == 1:
                    break  # the step under way is the last
        return profile.save()


def _batches(trainer: Trainer) -> Iterator[BagBatch]:
    """Epoch after epoch, without end."""
    for epoch in itertools.count():
        trainer.sampler.resume_at(epoch, 0)
        yield from trainer.loader
