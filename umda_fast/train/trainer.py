"""The training loop: Fabric for device and precision, one host synchronisation a step, exact resume.

The loop calls the model itself, inside `fabric.autocast()`, and not through Fabric's module wrapper: the
wrapper casts every output, which would cut `representation` out of the graph that self-guided learning
differentiates, and wraps gradients in DistributedDataParallel, where self-guided learning reduces per-task
gradients itself.

Several processes (torchrun) train as one would: each batch of `data.budget` instances is dealt out among them,
losses and penalties are weighted by what each process's mean is over, and all hold the same weights at every
step. A checkpoint is written by process 0 and fits any number of processes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from umda_fast.data import BagBatch, BagDataset, InstanceBudgetSampler, make_loader
from umda_fast.data.thinning import drop_instances
from umda_fast.errors import DataError, ProcessLostError
from umda_fast.model import UMDA, penalty_loss, task_losses
from umda_fast.runtime.config import ConfigError, RunConfig, as_dict, make_balancer
from umda_fast.runtime.guard import NonFiniteError, check_batch, explain_non_finite
from umda_fast.runtime.progress import ProgressReport
from umda_fast.runtime.random_state import random_state
from umda_fast.runtime.rundir import RunDirectory, save_model
from umda_fast.runtime.together import label_counts, penalty_counts, processes_of
from umda_fast.score.evaluation import SplitResult, evaluate_dataset, to_device
from umda_fast.sgl import SelfGuided
from umda_fast.sgl.distributed import GradientReducer
from umda_fast.train.checkpoint import Checkpoint, TrainingState
from umda_fast.train.log import TrainingLog
from umda_fast.train.optim import learning_rate_factor, parameter_groups
from umda_fast.train.quantiles import fit_bins
from umda_fast.train.scaling import standardize_inputs

__all__ = ["Trainer"]


@dataclass(frozen=True)
class _Share:
    """What one of several processes has of a batch.

    Attributes:
        counts: what its losses are means over, by task.
        losses: its share of that, by task.
        present: tasks that some process has, in their order.
        penalties: its share of what each penalty is a mean over.
        instances: of the whole batch.
    """

    counts: dict[str, float]
    losses: dict[str, float]
    present: list[str]
    penalties: dict[str, float]
    instances: int


class Trainer:
    """Trains `model` on `datasets["train"]`, keeps the weights with the best validation mean_score.

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

    Attributes:
        log: what is written on the way.
        state: where the training stands.
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
    ) -> None:
        self.config = config
        self.fabric = fabric
        self.processes = processes_of(fabric)
        self.run = run
        self.log = TrainingLog(run, writes=fabric.is_global_zero)
        self.state = TrainingState()
        self.saved_step: int | None = None
        self.progress = progress and fabric.is_global_zero
        self.train_set = datasets["train"]
        self.val_set = datasets.get("val")
        self.tasks = self.train_set.tasks
        if len(self.train_set) == 0:
            raise DataError("split 'train' holds no bags")
        options = config.train
        if config.data.standardize:
            only = None if config.data.standardize is True else config.data.standardize
            standardize_inputs(model, self.train_set, config.seed, only)
        fit_bins(model, self.train_set, config.seed)
        self.model = cast(Any, fabric.to_device(model))
        if self.processes is not None:
            # The seed made them equal already, unless an encoder of the user's was made otherwise.
            for value in self.model.state_dict().values():
                self.processes.from_first(value)
        self.guided: SelfGuided | None = self._self_guided()
        self.reducer: GradientReducer | None = None
        if self.processes is not None and self.guided is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.reducer = GradientReducer([trained], self.processes)
        averaged: list[nn.Parameter] = []
        if self.guided is not None and adds_averages(self.guided):
            averaged = list(self.model.shared_parameters())
        groups = parameter_groups(self.model, options.weight_decay, averaged, config.sgl.beta)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average: AveragedModel | None = None
        if options.ema > 0:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
        self.penalty_weights: dict[str, float] = dict(as_dict(config)["penalties"])
        # The sampler and the loader's own generator, not the global one, decide on the order of the bags, so
        # the position below is all that a resumed run needs to see the same batches.
        self.sampler = InstanceBudgetSampler(
            self.train_set.sizes,
            config.data.budget,
            shuffle=True,
            seed=config.seed,
            replicas=fabric.world_size,
            rank=fabric.global_rank,
        )
        self.loader = make_loader(self.train_set, self.sampler, workers=config.data.workers)

    def _self_guided(self) -> SelfGuided | None:
        sgl = self.config.sgl
        balancer = make_balancer(sgl)
        if balancer is None:
            return None
        missing = [name for name in ("shared_parameters", "task_parameters") if not hasattr(self.model, name)]
        if missing:
            architecture = self.config.model.get("architecture")
            raise ConfigError(
                f"sgl.balancer: expected none for the architecture {architecture}, got {sgl.balancer!r}"
            )
        try:
            return SelfGuided(
                self.model.shared_parameters(),
                tasks=[task.name for task in self.tasks],
                task_parameters=self.model.task_parameters(),
                balancer=balancer,
                scope=sgl.scope,
                last_shared_layer=self.model.last_shared_layer() if sgl.scope == "last_shared_layer" else (),
                every=sgl.every,
                beta=sgl.beta,
                direction=sgl.direction,
                weight_beta=sgl.weight_beta,
                statistics=sgl.statistics,
                variance_window=sgl.variance_window,
                control=sgl.control,
                process_group=None if self.processes is None else self.processes.group,
            )
        except ValueError as error:
            raise ConfigError(f"sgl: {error}") from None

    # ---- the loop ----

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that are judged and saved: their running mean if there is one."""
        return self.average.module if self.average is not None else self.model

    def fit(self) -> None:
        """Train to the end (or on to it, after `load`), writing metrics and checkpoints.

        Raises:
            NonFiniteError: a loss or a gradient became NaN or infinite; the weights are untouched.
            ProcessLostError: another process ended, or did not answer in time.
        """
        try:
            self._fit()
        except ProcessLostError as error:
            raise self._stopped(error) from error

    def _stopped(self, error: ProcessLostError) -> ProcessLostError:
        if self.fabric.is_global_zero and self.saved_step is not None:
            where = f"{self.run.checkpoint} holds step {self.saved_step}"
        else:
            where = f"the last checkpoint is in {self.run.checkpoint}"
        return ProcessLostError(
            f"step {self.state.step}: {error}; {where}; continue with --resume, with any number of processes"
        )

    def _fit(self) -> None:
        if not self.log.begun:
            self.log.begin()
        state, epochs = self.state, self.config.train.epochs
        began = time.monotonic() - state.total_seconds  # as if it had never been stopped
        with ProgressReport(
            "train", device=self.fabric.device, start=state.epoch / epochs, enabled=self.progress
        ) as report:
            while state.epoch < epochs and not state.finished:
                self._train_epoch(report, began)
                state.total_seconds = time.monotonic() - began
                self._end_epoch()
        self.log.close()

    def _train_epoch(self, report: ProgressReport, began: float) -> None:
        """What is left of an epoch, checkpoints within it included."""
        state, options, data = self.state, self.config.train, self.config.data
        self.sampler.resume_at(state.epoch, state.step_in_epoch)
        steps = self.sampler.num_batches(state.epoch)
        self.model.train()
        last = time.monotonic()
        for host in self.loader:
            if len(host) > 0:  # of several processes one may have nothing of a batch
                check_batch(host)
                host = drop_instances(host, data.instance_dropout, self.config.seed, state.epoch)
            instances = self._train_step(host, (state.epoch + state.step_in_epoch / steps) / options.epochs)
            state.step += 1
            state.step_in_epoch += 1
            state.instances += instances
            now = time.monotonic()
            state.train_seconds += now - last
            last = now
            note = f"epoch {state.epoch + 1}/{options.epochs}"
            if state.best_epoch >= 0:
                note += f", best mean_score {state.best_score:.4f}"
            done = (state.epoch + state.step_in_epoch / steps) / options.epochs
            report.update(done, instances=instances, note=note)
            every = options.checkpoint_steps
            if every and state.step % every == 0 and state.step_in_epoch < steps:
                state.total_seconds = time.monotonic() - began
                self.save()

    def _train_step(self, host: BagBatch, progress: float) -> int:
        """One update from this process's share of a batch; the number of instances in the whole of it."""
        options = self.config.train
        lr = options.lr * learning_rate_factor(progress, options.warmup, options.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        share = self._share(host)
        batch = to_device(host, self.fabric)
        out: Any = None
        losses: dict[str, Tensor] = {}
        penalty: Tensor | None = None
        if len(host) > 0:
            with self.fabric.autocast():
                out = self._forward(batch)
                losses = task_losses(self.tasks, out.logits, batch.labels, batch.label_mask)
                weights = self.penalty_weights
                if share is not None:
                    weights = {name: weight * share.penalties[name] for name, weight in weights.items()}
                penalty = penalty_loss(out.penalties, weights) if out.penalties else None
        elif self._guides_influence:
            assert self.guided is not None
            self.model.atsb.task_cosines.copy_(self.guided.cosine_ema)  # as the forward pass does it elsewhere
        if not (losses if share is None else share.present):
            return host.num_instances if share is None else share.instances  # nothing to learn from
        self.optimizer.zero_grad(set_to_none=True)
        if self.guided is not None:
            scoped = None
            if self.config.sgl.scope == "representation" and out is not None:
                scoped = getattr(out, "instances", out.representation)
            counts = None if share is None else share.counts
            self.guided.backward(losses, counts=counts, penalty=penalty, representation=scoped)
        else:
            parts = [loss if share is None else loss * share.losses[name] for name, loss in losses.items()]
            parts += [] if penalty is None else [penalty]
            total = torch.stack([part.float() for part in parts]).sum() if parts else None
            if self.reducer is not None:
                self.reducer.backward(total)
            elif total is not None:
                total.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if options.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, options.clip, norm)

        # The one synchronisation of the step: everything that decides whether the weights may be touched, at
        # once.
        watched = {f"loss/{name}": loss for name, loss in losses.items()}
        if penalty is not None:
            watched["penalty"] = penalty
        if share is not None:
            watched = self._whole(watched, share)
        watched = {"gradient_norm": norm, **watched}
        host_values = torch.stack(
            [value.detach().double().reshape(()) for value in watched.values()]
        ).tolist()
        values = dict(zip(watched, host_values, strict=True))
        if not all(math.isfinite(value) for value in host_values):
            lost = any(not math.isfinite(value) for name, value in values.items() if name != "gradient_norm")
            raise self._non_finite(batch, out, losses, lost)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.state.add(values)
        if self.state.step % options.log_steps == 0:
            self._log_step(lr, values, {} if out is None else out.penalties, share)
        return host.num_instances if share is None else share.instances

    def _share(self, host: BagBatch) -> _Share | None:
        """What this process has of the batch; None where there is one process. One exchange between them."""
        if self.processes is None:
            return None
        counts = label_counts(host, self.tasks)
        means = penalty_counts(host, self.penalty_weights)
        own = [*(counts.get(task.name, 0.0) for task in self.tasks), *means.values(), float(host.num_instances)]
        totals = self.processes.total_on_host(own)
        shares = [part / total if total > 0 else 0.0 for part, total in zip(own, totals, strict=True)]
        tasks = len(self.tasks)
        return _Share(
            counts=counts,
            losses={task.name: value for task, value in zip(self.tasks, shares[:tasks], strict=True)},
            present=[task.name for task, total in zip(self.tasks, totals[:tasks], strict=True) if total > 0],
            penalties=dict(zip(means, shares[tasks:-1], strict=True)),
            instances=int(totals[-1]),
        )

    def _whole(self, watched: Mapping[str, Tensor], share: _Share) -> dict[str, Tensor]:
        """Losses and penalty of the whole batch, in the order in which one process has them."""
        assert self.processes is not None
        zero = torch.zeros((), dtype=torch.float64, device=self.fabric.device)
        parts = [
            watched[f"loss/{name}"].detach().double() * share.losses[name] if f"loss/{name}" in watched else zero
            for name in share.present
        ]
        has_penalty = torch.full_like(zero, "penalty" in watched)
        parts += [watched.get("penalty", zero).detach().double().reshape(()), has_penalty]
        *losses, penalty, penalized = self.processes.total(torch.stack(parts)).unbind()
        whole = {f"loss/{name}": loss for name, loss in zip(share.present, losses, strict=True)}
        # A penalty that no process has is 0, and one that is 0 tells nothing.
        return whole if not penalized.is_nonzero() else {**whole, "penalty": penalty}

    def _non_finite(
        self, batch: BagBatch, out: Any, losses: Mapping[str, Tensor], lost: bool
    ) -> NonFiniteError:
        """The error that names what is not finite, where it is this process's; `lost`: a loss or the penalty is
        not, in some process."""
        own = {} if out is None else {**out.logits, **losses, **out.penalties}
        finite = all(bool(torch.isfinite(value.detach()).all()) for value in own.values())
        if out is None or (finite and lost):
            return NonFiniteError(
                f"step {self.state.step}: training stopped before the weights were touched; what is not finite came "
                "from another process, whose message names it"
            )
        return explain_non_finite(
            batch, out.logits, {**losses, **out.penalties}, self.model.named_parameters(), step=self.state.step
        )

    def _forward(self, batch: BagBatch) -> Any:
        if self._guides_influence:
            assert self.guided is not None
            return self.model(**batch.inputs(), task_cosines=self.guided.cosine_ema)
        return self.model(**batch.inputs())

    @property
    def _guides_influence(self) -> bool:
        return self.guided is not None and isinstance(self.model, UMDA) and bool(self.model.config.kappa_g)

    def _log_step(
        self, lr: float, values: Mapping[str, float], penalties: Mapping[str, Tensor], share: _Share | None
    ) -> None:
        record: dict[str, Any] = {
            "kind": "step",
            "step": self.state.step,
            "epoch": self.state.epoch,
            "lr": lr,
            "gradient_norm": values["gradient_norm"],
            "losses": {name[5:]: value for name, value in values.items() if name.startswith("loss/")},
        }
        if penalties:
            stacked = torch.stack(
                [value.detach().double().reshape(()) for value in penalties.values()]
            ).tolist()
            record["penalties"] = dict(zip(penalties, stacked, strict=True))
        if self.processes is not None and share is not None:
            own = record.pop("penalties", {})
            weighted = {name: own[name] * part for name, part in share.penalties.items() if name in own}
            parts = self.processes.objects(weighted)
            names = list(dict.fromkeys(name for part in parts for name in part))
            if names:
                record["penalties"] = {name: sum(part.get(name, 0.0) for part in parts) for name in names}
            if self.processes.rank > 0:
                return
        if self.guided is not None:
            record["sgl"] = self.guided.metrics()
        self.log.write(record, self.state.step)

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
            score = result.mean_score
            names = ("losses", "tasks", "mean_score", "view_consistency")
            record["val"] = {name: getattr(result, name) for name in names}
        better = state.offer(score, self.evaluated_model.state_dict())
        record["best_epoch"] = state.best_epoch
        self.log.write(record, state.step)
        state.epoch += 1
        state.step_in_epoch = 0
        state.sums = {}
        state.finished = state.epoch >= options.epochs or (
            options.patience > 0 and state.epoch - 1 - state.best_epoch >= options.patience
        )
        self.save()
        if better and self.fabric.is_global_zero and options.keep == "all":
            self.save_best()

    def evaluate(self, dataset: BagDataset, model: nn.Module | None = None) -> SplitResult:
        """`evaluated_model` (or `model`) on `dataset`."""
        return evaluate_dataset(model or self.evaluated_model, dataset, self.fabric, self.config.data)

    # ---- checkpoints ----

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
        guided = self.guided.state_dict(keep=zero) if self.guided is not None else None
        random = [random_state()] if self.processes is None else self.processes.objects(random_state())
        if not zero:
            return
        Checkpoint(
            config=as_dict(self.config),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            sgl=guided,
            average=self.average.state_dict() if self.average is not None else None,
            random=random,
            sampler=self.sampler.state_dict(),
            state=self.state,
            log_offset=self.log.sync(),
        ).write(self.run.checkpoint)
        self.saved_step = self.state.step

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
            self.log.begin()
            return
        saved = Checkpoint.read(path, self.config)
        try:
            self.model.load_state_dict(saved.model)
            self.optimizer.load_state_dict(saved.optimizer)
            if self.guided is not None:
                self.guided.load_state_dict(saved.sgl or {})
            if self.average is not None:
                self.average.load_state_dict(saved.average or {})
            self.sampler.load_state_dict(saved.sampler)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: does not fit this model: {' '.join(str(error).split())[:300]}"
            ) from None
        self.state = saved.state
        # A run that had ended goes on only if it is given more epochs than it had.
        self.state.finished &= self.config.train.epochs <= saved.config["train"]["epochs"]
        self.saved_step = self.state.step
        self.log.begin(saved.log_offset)
        saved.restore_random_state(self.config.seed, self.fabric.global_rank)


def adds_averages(guided: SelfGuided) -> bool:
    """Whether `.grad` of the shared parameters is a running mean after `backward`, not a gradient."""
    return guided.scope == "shared_parameters" and guided.statistics and guided.direction == "average"
