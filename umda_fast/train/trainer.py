"""The training loop: epochs, validation, the best weights, early stopping, the log, and exact resume.

Several processes (torchrun) train as one would: each batch of `data.budget` instances is dealt out among them, losses
and penalties are weighted by what each process's mean is over, and all hold the same weights at every step. A
checkpoint is written by process 0 and fits any number of processes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from umda_fast.blocks import block
from umda_fast.data import BagBatch, BagDataset, InstanceBudgetSampler, make_loader
from umda_fast.data.thinning import drop_instances
from umda_fast.errors import DataError, ProcessLostError
from umda_fast.model.baselines import Linear
from umda_fast.profiling import StepProfile
from umda_fast.runtime.config import RunConfig, SGLConfig, as_dict
from umda_fast.runtime.guard import check_batch
from umda_fast.runtime.progress import ProgressReport
from umda_fast.runtime.random_state import random_state
from umda_fast.runtime.rundir import RunDirectory, save_model
from umda_fast.score.evaluation import SplitResult, evaluate_dataset
from umda_fast.score.skill import SkillScale
from umda_fast.train.checkpoint import Checkpoint, TrainingState
from umda_fast.train.linear import fit_linear
from umda_fast.train.log import TrainingLog
from umda_fast.train.plan import make_plan
from umda_fast.train.quantiles import fit_bins
from umda_fast.train.scaling import scale_inputs
from umda_fast.train.selection import Selection
from umda_fast.train.step import TrainStep

__all__ = ["Trainer"]


class Trainer:
    """Trains `model` on `datasets["train"]`, keeps the weights that are best on `datasets["val"]`.

    Args:
        config: the run's.
        model: takes `BagBatch.inputs()`, returns an object with `logits` and `penalties`; self-guided
            learning further needs `shared_parameters()`, `task_parameters()`, `last_shared_layer()` and
            `representation` (or `instances`, which knows a shorter way to the gradients on it) as `UMDA` has
            them.
        datasets: split -> bags; "train" is needed, "val" decides which weights are best and when to stop
            early.
        run: the directory for checkpoints and metrics.
        fabric: device, precision and processes.
        progress: show progress on standard error.
        profile: looks at some of the steps.

    Attributes:
        train_step: what changes the weights.
        state: where the training stands.
        fitted: whether the model is fitted already, to all bags at once, and only remains to be judged.
        plan: how long it trains, in which batches.
        skill: what the tasks' skill is relative to.
        selection: what decides which weights are best.
        log: what is written on the way.
        scaling: how the features of every view are scaled, a line each.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        datasets: Mapping[str, BagDataset],
        run: RunDirectory,
        fabric: Fabric,
        *,
        progress: bool = True,
        profile: StepProfile | None = None,
    ) -> None:
        self.config = config
        self.fabric = fabric
        self.run = run
        self.progress = progress and fabric.is_global_zero
        self.profile = StepProfile(0, fabric.device, run.profile) if profile is None else profile
        self.train_set = datasets["train"]
        self.val_set = datasets.get("val")
        if len(self.train_set) == 0:
            raise DataError("split 'train' holds no bags")
        self.scaling = scale_inputs(model, self.train_set, config.data.standardize, config.seed)
        fit_bins(model, self.train_set, config.seed)
        self.fitted = isinstance(model, Linear)
        if isinstance(model, Linear):
            fit_linear(model, self.train_set, config.data, config.seed)
            config = dataclasses.replace(config, sgl=SGLConfig(balancer="none"))  # there are no gradients
        self.train_step = TrainStep(config, model, self.train_set.tasks, fabric)
        self.plan = make_plan(config.train, config.data, self.train_set.sizes)
        if self.fitted:
            self.plan = dataclasses.replace(self.plan, epochs=1, steps=None)
        # The sampler and the loader's own generator, not the global one, decide on the order of the bags, so
        # the position in `state` is all that a resumed run needs to see the same batches.
        self.sampler = InstanceBudgetSampler(
            self.train_set.sizes,
            config.data.budget,
            shuffle=True,
            seed=config.seed,
            max_bags=self.plan.bags,
            replicas=fabric.world_size,
            rank=fabric.global_rank,
        )
        self.loader = make_loader(self.train_set, self.sampler, workers=config.data.workers)
        self.state = TrainingState()
        self.skill = SkillScale(self.train_set)
        self.selection = Selection(config.train.select, self.train_set.tasks)
        self.log = TrainingLog(run, writes=fabric.is_global_zero)
        self._saved_step: int | None = None

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that are judged and saved: their running mean if there is one."""
        return self.train_step.evaluated_model

    def check_profile(self) -> None:
        """Raise DataError if what is left of the training is too short for its profile."""
        left = 0 if self.fitted or self.state.finished else self.plan.updates - self.state.step
        self.profile.check(left)

    # ---- the loop ----

    def fit(self) -> None:
        """Train to the end (or on to it, after `load`), writing metrics and checkpoints.

        Raises:
            NonFiniteError: a loss or a gradient became NaN or infinite; the weights are untouched.
            ProcessLostError: another process ended, or did not answer in time.
        """
        try:
            self._fit()
        except ProcessLostError as error:
            where = f"the last checkpoint is in {self.run.checkpoint}"
            if self.fabric.is_global_zero and self._saved_step is not None:
                where = f"{self.run.checkpoint} holds step {self._saved_step}"
            raise ProcessLostError(
                f"step {self.state.step}: {error}; {where}; continue with --resume, with any number of processes"
            ) from error

    def _fit(self) -> None:
        if not self.log.begun:
            self.log.begin()
            self.log.write({"kind": "inputs", "step": 0, "scaling": self.scaling}, step=0)
        state, plan = self.state, self.plan
        self._announce()
        began = time.monotonic() - state.total_seconds  # as if it had never been stopped
        start = plan.progress(state.epoch, state.step)
        with ProgressReport("train", device=self.fabric.device, start=start, enabled=self.progress) as report:
            while not (state.finished or plan.done(state.epoch, state.step)):
                if not self.fitted:
                    self._train_epoch(report, began)
                state.total_seconds = time.monotonic() - began
                self._end_epoch()
        self.log.close()

    def _announce(self) -> None:
        if self.state.finished or self.fitted or not self.progress:
            return
        print(f"train: {self.plan.describe()}", file=sys.stderr)
        warning = self.plan.warning()
        if warning is not None:
            print(f"train: warning: {warning}", file=sys.stderr)

    def _train_epoch(self, report: ProgressReport, began: float) -> None:
        """What is left of an epoch, checkpoints within it included."""
        state, plan, options = self.state, self.plan, self.config.train
        self.sampler.resume_at(state.epoch, state.step_in_epoch)
        steps = self.sampler.num_batches(state.epoch)
        self.train_step.model.train()
        last = time.monotonic()
        for drawn in self.profile.steps(self.loader):
            host = self.prepare(drawn, state.epoch)
            progress = plan.progress(state.epoch + state.step_in_epoch / steps, state.step)
            result = self.train_step(host, progress, state.step)
            state.add(result.values)
            if result.values and state.step % options.log_steps == 0:
                self._log_step(result.record())
            state.step += 1
            state.step_in_epoch += 1
            state.instances += result.instances
            now = time.monotonic()
            state.train_seconds += now - last
            last = now
            note = plan.place(state.epoch, state.step)
            if math.isfinite(state.best_score):
                note += f", best {self.selection.show(state.best_score)}"
            done = plan.progress(state.epoch + state.step_in_epoch / steps, state.step)
            report.update(done, instances=result.instances, note=note)
            if plan.done(state.epoch, state.step):
                break  # in mid-epoch
            every = options.checkpoint_steps
            if every and state.step % every == 0 and state.step_in_epoch < steps:
                state.total_seconds = time.monotonic() - began
                self.save()

    def prepare(self, host: BagBatch, epoch: int) -> BagBatch:
        """What of a batch that was drawn is trained on; DataError for one that cannot be."""
        with block("data"):
            if len(host) == 0:  # of several processes one may have nothing of a batch
                return host
            check_batch(host)
            return drop_instances(host, self.config.data.instance_dropout, self.config.seed, epoch)

    def _log_step(self, figures: Mapping[str, Any]) -> None:
        if not self.log.begun:
            return  # another process writes
        record = {"kind": "step", "step": self.state.step, "epoch": self.state.epoch, **figures}
        guided = self.train_step.gradients.metrics()
        self.log.write(record if guided is None else {**record, "sgl": guided}, self.state.step)

    def _end_epoch(self) -> None:
        """Validation, the best weights, the log and a checkpoint; decides whether to stop."""
        state, options = self.state, self.config.train
        record: dict[str, Any] = {
            "kind": "epoch",
            "step": state.step,
            "epoch": state.epoch,
            "train": state.means(),
            "seconds": state.total_seconds,
            "instances_per_second": state.instances_per_second,
        }
        score = math.nan
        if self.val_set is not None and len(self.val_set) > 0:
            result = self.evaluate(self.val_set)
            skill = self.skill(result, self.val_set)
            score = self.selection.score(result, skill)
            names = ("losses", "calibrated_losses", "tasks", "mean_score", "view_consistency")
            record["val"] = {name: getattr(result, name) for name in names} | {"skill": vars(skill)}
        better = state.offer(score, self.evaluated_model.state_dict())
        record["best_epoch"] = state.best_epoch
        self.log.write(record, state.step)
        state.epoch += 1
        state.step_in_epoch = 0
        state.sums = {}
        state.finished = self.plan.done(state.epoch, state.step) or (
            options.patience > 0 and state.epoch - 1 - state.best_epoch >= options.patience
        )
        self.save()
        if better and self.fabric.is_global_zero and options.keep == "all":
            self.save_best()

    def evaluate(self, dataset: BagDataset, model: nn.Module | None = None) -> SplitResult:
        """`evaluated_model` (or `model`) on `dataset`."""
        return evaluate_dataset(model or self.evaluated_model, dataset, self.fabric, self.config.data)

    # ---- what is kept ----

    def best_model(self) -> Any:
        """A copy of the model with the best weights, in evaluation mode."""
        model: Any = copy.deepcopy(self.evaluated_model)
        if self.state.best_weights:
            model.load_state_dict(self.state.best_weights)
        return model.eval()

    def save_best(self) -> None:
        """Write the best weights as model.safetensors and config.json."""
        save_model(self.best_model(), self.run.path)

    def save(self) -> None:
        """Write checkpoint.pt. Every process calls it; process 0 writes."""
        if self.config.train.keep == "scores":
            return
        zero = self.fabric.is_global_zero
        weights = self.train_step.state_dict(keep=zero)
        random = self.train_step.processes.gather(random_state())
        if not zero:
            return
        Checkpoint(
            config=as_dict(self.config),
            **weights,
            random=random,
            sampler=self.sampler.state_dict(),
            state=self.state,
            log_offset=self.log.sync(),
        ).write(self.run.checkpoint)
        self._saved_step = self.state.step

    def load(self) -> None:
        """Continue from checkpoint.pt; a run killed before its first checkpoint begins anew.

        With as many processes as wrote it each goes on with its own random numbers; with another number the
        additional ones draw new numbers, so that dropout differs.

        Raises:
            DataError: the file is no checkpoint of this version, or of a model of another shape.
            ConfigError: the run was configured otherwise.
        """
        path = self.run.checkpoint
        if not path.is_file():
            return
        saved = Checkpoint.read(path, self.config)
        try:
            self.train_step.load_state_dict(vars(saved))
            self.sampler.load_state_dict(saved.sampler)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: does not fit this model: {' '.join(str(error).split())[:300]}"
            ) from None
        self.state = saved.state
        # A run that had ended goes on only if it is given more than it had.
        then = saved.config["train"]
        options = dataclasses.replace(self.config.train, epochs=then["epochs"], steps=then.get("steps"))
        self.state.finished &= self.plan.updates <= make_plan(options, self.config.data, self.train_set.sizes).updates
        self._saved_step = self.state.step
        self.log.begin(saved.log_offset)
        saved.restore_random_state(self.config.seed, self.fabric.global_rank)
