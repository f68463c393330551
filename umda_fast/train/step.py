"""One step of training: forward, losses, gradients, clipping, and the update. It waits for the device once, to read all
that decides whether the weights may be touched; which labels there are is known from the batch on the host.

The model is called itself, inside `fabric.autocast()`, and not through Fabric's module wrapper: the wrapper casts every
output, which would cut `representation` out of the graph that self-guided learning differentiates, and wraps gradients
in DistributedDataParallel, where self-guided learning reduces per-task gradients itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from umda_fast.blocks import block
from umda_fast.data import BagBatch
from umda_fast.model import TaskSpec, penalty_loss, task_losses, view_losses
from umda_fast.runtime.config import RunConfig, as_dict
from umda_fast.runtime.guard import NonFiniteError, explain_non_finite
from umda_fast.score.inference import to_device
from umda_fast.train.gradients import make_gradients
from umda_fast.train.optim import WeightAverage, make_optimizer, restore_optimizer, set_learning_rate
from umda_fast.train.risk_sets import RiskSets
from umda_fast.train.share import Share, processes_for

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["StepResult", "TrainStep"]


@dataclass(frozen=True)
class StepResult:
    """What came of a step.

    Attributes:
        lr: the learning rate.
        share: what this process had of the batch.
        values: of the whole batch: `gradient_norm` (before clipping), `loss/<task>` of the tasks with labels, and
            `penalty`, the weighted sum, if there is any; empty if there was nothing to learn from.
        penalties: of this process's part, unweighted, on the device.
        view_losses: likewise, by task, of what every view alone says, before their weight; empty without `view_heads`.
    """

    lr: float
    share: Share
    values: dict[str, float] = field(default_factory=dict)
    penalties: dict[str, Tensor] = field(default_factory=dict)
    view_losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def instances(self) -> int:
        """Of the whole batch."""
        return self.share.instances

    def record(self) -> dict[str, Any]:
        """Figures for the log. Waits for the device; every process calls it."""
        record: dict[str, Any] = {
            "lr": self.lr,
            "gradient_norm": self.values["gradient_norm"],
            "losses": {name[5:]: value for name, value in self.values.items() if name.startswith("loss/")},
        }
        more = {
            "view_losses": self.share.read_losses(self.view_losses),
            "penalties": self.share.read_penalties(self.penalties),
        }
        return record | {name: figures for name, figures in more.items() if figures}


@dataclass(frozen=True)
class _Forward:
    """What the model made of this process's part of a batch: nothing, if that is empty."""

    out: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    view_losses: dict[str, Tensor] = field(default_factory=dict)
    view_weight: float = 0.0
    penalty: Tensor | None = None

    @property
    def trained(self) -> dict[str, Tensor]:
        """The loss of every task with what every view alone loses: what there are gradients of."""
        if not self.view_losses:
            return self.losses
        return {name: loss + self.view_weight * self.view_losses[name] for name, loss in self.losses.items()}

    @property
    def logits(self) -> Mapping[str, Tensor]:
        return {} if self.out is None else self.out.logits

    @property
    def penalties(self) -> dict[str, Tensor]:
        return {} if self.out is None else self.out.penalties


def _labels_of(host: BagBatch, batch: BagBatch) -> tuple[set[str], dict[str, Tensor]]:
    """Tasks with a label in a batch, and the masks of those that some of its bags lack: read on the host, used on the
    device."""
    there = {name: mask.numpy() for name, mask in host.label_mask.items()}
    labelled = {name for name in host.labels if name not in there or there[name].any()}
    return labelled, {name: mask for name, mask in batch.label_mask.items() if not there[name].all()}


class TrainStep:
    """Updates a model's weights batch by batch; a callable.

    Args:
        config: of the run: `train`, `sgl` and `penalties` count.
        model: see `Trainer`; goes to the fabric's device, with the weights of process 0 everywhere.
        tasks: with a loss.
        fabric: device, precision and processes.

    Attributes:
        model: on the device.
        processes: that take the step together.
        risk_sets: the losses of tasks whose bags are compared with each other.
        gradients: of the losses.
        optimizer: AdamW.
        average: a running mean of the weights, or None.

    Raises:
        ConfigError: the configuration of self-guided learning does not go with the model.
    """

    def __init__(self, config: RunConfig, model: nn.Module, tasks: Sequence[TaskSpec], fabric: Fabric) -> None:
        self.fabric = fabric
        self.tasks = tuple(tasks)
        self.options = config.train
        self.penalty_weights: dict[str, float] = as_dict(config)["penalties"]
        self.model = cast(Any, fabric.to_device(model))
        self.processes = processes_for(fabric, self.tasks, self.penalty_weights)
        # The seed made the weights equal already, unless an encoder of the user's was made otherwise.
        self.processes.align(self.model)
        self.risk_sets = RiskSets(self.tasks, self.processes)
        self._apart = [task for task in self.tasks if task not in self.risk_sets.tasks]
        self.gradients = make_gradients(config, self.model, self.tasks, self.processes)
        self.optimizer = make_optimizer(self.model, config.train, self.gradients.averaged, config.sgl.beta)
        self.average = None if config.train.ema == 0 else WeightAverage(self.model, config.train.ema)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that are judged and saved: their running mean if there is one."""
        return self.average.module if self.average is not None else self.model

    def __call__(self, host: BagBatch, progress: float, number: int) -> StepResult:
        """One update from this process's part of a batch. Every process calls it.

        Args:
            host: that part, in host memory; it may be empty if there are several processes.
            progress: share of the training that is done, in [0, 1]: decides on the learning rate.
            number: of the step, for messages.

        Raises:
            NonFiniteError: a loss or a gradient became NaN or infinite; the weights are untouched.
            ProcessLostError: another process ended, or did not answer in time.
        """
        lr = set_learning_rate(self.optimizer, self.options, progress)
        share = self.processes.share(host)
        with block("data"):
            batch = to_device(host, self.fabric)
        forward = self._forward(host, batch, share, progress)
        if not share.teaches(forward.losses):
            return StepResult(lr, share)
        self.optimizer.zero_grad(set_to_none=True)
        with block("losses"):
            trained = forward.trained
        with block("gradients" if self.gradients.guided is None else "SGL"):
            self.gradients.backward(trained, forward.penalty, forward.out, share)
        with block("optimiser"):
            norm = self._clip()
        # One wait for the device for all that decides whether the weights may be touched.
        values = share.read(norm, forward.losses, forward.penalty)
        if not all(map(math.isfinite, values.values())):
            raise self._non_finite(batch, forward, values, share, number)
        with block("optimiser"):
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        penalties, alone = (
            {name: value.detach() for name, value in part.items()} for part in (forward.penalties, forward.view_losses)
        )
        return StepResult(lr, share, values, penalties, alone)

    def _forward(self, host: BagBatch, batch: BagBatch, share: Share, progress: float) -> _Forward:
        if len(batch) == 0:
            self.gradients.skip_forward()
            self.risk_sets.losses(batch, batch, None)
            return _Forward()
        with self.fabric.autocast():
            with block("model"):
                out = self.model(**batch.inputs(), **self.gradients.model_inputs())
            with block("losses"):
                compared, compared_alone = self.risk_sets.losses(host, batch, out)
                labelled, masks = _labels_of(host, batch)
                losses = task_losses(self._apart, out.logits, batch.labels, masks, labelled) | compared
                view_weight, alone = self.options.view_loss * (1.0 - progress), {}
                if view_weight > 0.0 and getattr(out, "view_logits", None) is not None:
                    there = [task for task in self._apart if task.name in losses]
                    alone = view_losses(there, out.view_logits, out.view_present, batch.labels, masks)
                    alone |= compared_alone
                weights = share.penalty_weights(self.penalty_weights)
                penalty = penalty_loss(out.penalties, weights) if out.penalties else None
        return _Forward(out, losses, alone, view_weight, penalty)

    def _clip(self) -> Tensor:
        """Norm of the gradient, which is then cut to the largest that is allowed."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.options.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.options.clip, norm)
        return norm

    def _non_finite(
        self, batch: BagBatch, forward: _Forward, values: Mapping[str, float], share: Share, number: int
    ) -> NonFiniteError:
        """The error that names what is not finite, where it is this process's."""
        of_views = {f"{name} by every view alone": loss for name, loss in forward.view_losses.items()}
        blamed = {**forward.losses, **of_views, **forward.penalties}
        lost = any(not math.isfinite(value) for name, value in values.items() if name != "gradient_norm")
        if share.spoiled_elsewhere([*forward.logits.values(), *blamed.values()], lost):
            return NonFiniteError(
                f"step {number}: training stopped before the weights were touched; what is not finite came "
                "from another process, whose message names it"
            )
        return explain_non_finite(batch, forward.logits, blamed, self.model.named_parameters(), step=number)

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """`model`, `optimizer`, `sgl`, `average` and `recent`, each as a checkpoint holds it. Every process calls it;
        those without `keep` need no whole answer."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sgl": self.gradients.state_dict(keep=keep),
            "average": None if self.average is None else self.average.state_dict(),
            "recent": self.risk_sets.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            RuntimeError, ValueError, KeyError, TypeError: it is of another model.
        """
        self.model.load_state_dict(state["model"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.gradients.load_state_dict(state["sgl"])
        if self.average is not None:
            self.average.load_state_dict(state["average"] or {})
        self.risk_sets.load_state_dict(state["recent"])
