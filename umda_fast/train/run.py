"""From a configuration to a filled run directory: `train`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from umda_fast import ops
from umda_fast.data import BagDataset
from umda_fast.files import write_json
from umda_fast.model import Mixture
from umda_fast.profiling import StepProfile
from umda_fast.runtime.config import RunConfig, dump_config
from umda_fast.runtime.fabric import make_fabric, processes_of
from umda_fast.runtime.progress import peak_memory_mb
from umda_fast.runtime.random_state import rank_seed
from umda_fast.runtime.rundir import RunDirectory, save_model
from umda_fast.runtime.together import one_decides
from umda_fast.score.collect import calibrate
from umda_fast.score.completion import complete_tasks
from umda_fast.score.thresholds import choose_thresholds
from umda_fast.train.build import build_model
from umda_fast.train.data import training_data
from umda_fast.train.linear import beside_linear
from umda_fast.train.log import tensorboard_events
from umda_fast.train.plots import plot_run
from umda_fast.train.selection import Selection
from umda_fast.train.split_record import SplitRecord
from umda_fast.train.summary import summary
from umda_fast.train.trainer import Trainer

__all__ = ["RunResult", "computing", "train"]


@dataclass
class RunResult:
    """A finished run: its directory, the content of metrics.json, the split it was measured on, and the model
    with the best weights, in evaluation mode: a `Mixture` if anything was mixed into it; and the profile, if one was
    asked for."""

    directory: Path
    metrics: dict[str, Any]
    split: str
    model: Any
    profile: dict[str, Any] | None = None


def train(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    datasets: Mapping[str, BagDataset] | None = None,
    encoders: Mapping[str, nn.Module] | None = None,
    progress: bool = True,
    plots: bool = True,
    profile: int = 0,
) -> RunResult:
    """Train, keep the weights with the best validation score, measure them on the test split, and fill the
    run directory.

    Args:
        config: everything the run depends on.
        out: the run directory; must not hold a run unless `resume`.
        resume: continue from the directory's checkpoint. On the CPU the weights come out bit-identical to
            those of a run that was never stopped.
        datasets: split -> bags, instead of `config.data.source`. "train" is needed, "val" and "test" are used
            if there.
        encoders: view -> module, see `UMDA`.
        progress: show progress on standard error.
        plots: draw plots/ at the end.
        profile: steps of it to profile, after some to warm up, into profile/; changes no result.

    Under torchrun all processes train one model together, as one of them would: `data.bags` and
    `data.budget` are those of the whole batch, and the weights come out the same within rounding (with dropout, each
    draws numbers of its own). Process 0 alone writes; the result is the same in all.

    Raises:
        DataError, ConfigError: the configuration, the directory or the data cannot be used, or the training is too
        short for its profile.
        NonFiniteError: a loss or a gradient became NaN or infinite; the weights and the last checkpoint are
        untouched.
        ProcessLostError: another process ended or did not answer in time; the last checkpoint is whole.
    """
    fabric = make_fabric(config)
    processes = processes_of(fabric)
    zero = fabric.is_global_zero
    # The default name of a run directory has the time in it, which two processes may read differently.
    run = RunDirectory(out if processes is None else processes.object_from_first(os.fspath(out)))
    one_decides(processes, lambda: run.begin(resume=resume))
    config, datasets = training_data(config, datasets, run, resume=resume)
    Selection(config.train.select, datasets["train"].tasks)  # a wrong name is said before anything is written
    if not resume:
        record = SplitRecord.of(datasets, config.data, processes, progress=progress and zero)
        if zero:
            record.write(run.splits)
    looked_at = StepProfile(profile if zero else 0, fabric.device, run.profile)
    with computing(config, fabric):
        Fabric.seed_everything(config.seed, verbose=False)
        model = build_model(config, datasets["train"], encoders)
        trainer = Trainer(config, model, datasets, run, fabric, progress=progress, profile=looked_at)
        if not zero:
            Fabric.seed_everything(rank_seed(config.seed, fabric.global_rank, 0), verbose=False)
        if resume:
            trainer.load()
        one_decides(processes, trainer.check_profile)
        if zero:
            dump_config(config, run.config)
        if zero and not trainer.state.finished:
            run.mixture.unlink(missing_ok=True)  # of weights that will be others
        keep_all = config.train.keep == "all"
        with contextlib.ExitStack() as stack:
            if keep_all and zero:
                trainer.log.events = stack.enter_context(tensorboard_events(run, trainer.state.step))
            with looked_at.whole():
                trainer.fit()
        table = None
        if profile and zero and looked_at.missing:
            warnings.warn(f"profile: none, for the training ended {looked_at.missing} steps too early", stacklevel=2)
        elif profile and zero:
            table = looked_at.save()
        best = trainer.best_model()
        beside = None
        mix, rule = config.train.linear == "mix", config.train.thresholds
        asked = mix or (config.train.linear == "beside" and keep_all)
        if asked and not trainer.fitted and len(datasets.get("val", ())):
            parts = datasets["train"], datasets["val"]
            best, beside = beside_linear(best, *parts, fabric, config.data, config.seed, mix=mix, thresholds=rule)
        complete_tasks(best, datasets["train"], fabric, config.data)
        choose_thresholds(best, datasets, rule, fabric, config.data)
        split = next((name for name in ("test", "val") if name in datasets and len(datasets[name])), "train")
        result = trainer.evaluate(datasets[split].with_tasks(best.config.tasks), best)
        if keep_all and zero and len(datasets.get("val", ())):
            calibrate(best, datasets["val"], fabric, config.data).save(run.calibration)
    more: dict[str, Any] = {
        "scaling": trainer.scaling,
        "guided": trainer.train_step.gradients.guided,
        "linear": beside,
        "kept": trainer.selection.kept(trainer.state),
        "processes": fabric.world_size,
        "peak_memory": max(trainer.train_step.processes.gather(peak_memory_mb(fabric.device))),
    }
    metrics = one_decides(
        processes, lambda: summary(config, datasets, split, result, run, trainer.state, **more)
    )
    if zero:
        if keep_all:
            save_model(best, run.path)
            if not isinstance(best, Mixture):
                run.mixture.unlink(missing_ok=True)
        write_json(run.metrics, metrics)
        if plots and keep_all:
            plot_run(run, datasets["train"].views, datasets["train"].tasks, result)
    return RunResult(run.path, metrics, split, best, table)


@contextlib.contextmanager
def computing(config: RunConfig, fabric: Fabric) -> Iterator[None]:
    """How a run computes: by which backend, and whether by deterministic algorithms."""
    on_cpu = fabric.device.type == "cpu"
    deterministic = config.train.deterministic if config.train.deterministic is not None else on_cpu
    with _deterministic(deterministic), ops.prefer_backend(config.backend, strict=config.strict_backend):
        yield


@contextlib.contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Torch's deterministic algorithms for the length of a run.

    Filling fresh memory with NaN finds reads of it in tests and costs time in a run, so it is off.
    """
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill
