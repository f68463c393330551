"""How the losses of the tasks become gradients: `SelfGuidance`, or, without a balancer, those of their `PlainSum`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from umda_fast.model import UMDA, TaskSpec
from umda_fast.runtime.config import ConfigError, RunConfig, make_balancer
from umda_fast.sgl import SelfGuided
from umda_fast.train.share import OneProcess, SeveralProcesses, Share

__all__ = ["Gradients", "PlainSum", "SelfGuidance", "make_gradients"]


class PlainSum:
    """Gradients of the sum of all losses and the penalty.

    Args:
        model: on its device.
        processes: that train it.
    """

    guided: SelfGuided | None = None

    def __init__(self, model: nn.Module, processes: OneProcess | SeveralProcesses) -> None:
        self._backward = processes.backward_of(p for p in model.parameters() if p.requires_grad)

    @property
    def averaged(self) -> list[nn.Parameter]:
        """Parameters whose `.grad` is a running mean after `backward`, not a gradient."""
        return []

    def model_inputs(self) -> dict[str, Any]:
        """What the model is told besides the batch."""
        return {}

    def skip_forward(self) -> None:
        """Have on the model the effect of a forward pass that this process, whose part is empty, does not make."""

    def backward(self, losses: Mapping[str, Tensor], penalty: Tensor | None, out: Any, share: Share) -> None:
        """Add the gradient of the whole batch's total loss to `.grad`.

        Args:
            losses, penalty: of this process's part of the batch, by task; the penalty weighted by its share.
            out: what the model gave for it, None where it is empty.
            share: which part it is.
        """
        parts = share.weighted(losses) + ([] if penalty is None else [penalty])
        self._backward(torch.stack([part.float() for part in parts]).sum() if parts else None)

    def metrics(self) -> dict[str, float] | None:
        """Figures for the log, None if there are none; waits for the device."""
        return None

    def state_dict(self, *, keep: bool = True) -> dict[str, Any] | None:
        """What a resumed run needs. Every process calls it; those without `keep` need no whole answer."""
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Put back what `state_dict` gave; ValueError or KeyError if it does not fit."""


class SelfGuidance:
    """Self-guided learning (`SelfGuided`); methods are those of `PlainSum`.

    Args:
        guided: what does it.
        model: whose influence matrix is told the cosines between the tasks' gradients, if it has one that listens.
    """

    def __init__(self, guided: SelfGuided, model: Any) -> None:
        self.guided = guided
        self._model = model
        self._influences = isinstance(model, UMDA) and bool(model.config.kappa_g)

    @property
    def averaged(self) -> list[nn.Parameter]:
        guided = self.guided
        averages = guided.scope == "shared_parameters" and guided.statistics and guided.direction == "average"
        return list(self._model.shared_parameters()) if averages else []

    def model_inputs(self) -> dict[str, Any]:
        return {"task_cosines": self.guided.cosine_ema} if self._influences else {}

    def skip_forward(self) -> None:
        if self._influences:
            self._model.atsb.task_cosines.copy_(self.guided.cosine_ema)

    def backward(self, losses: Mapping[str, Tensor], penalty: Tensor | None, out: Any, share: Share) -> None:
        scoped = None
        if self.guided.scope == "representation" and out is not None:
            scoped = getattr(out, "instances", out.representation)
        self.guided.backward(losses, counts=share.counts, penalty=penalty, representation=scoped)

    def metrics(self) -> dict[str, float] | None:
        return self.guided.metrics()

    def state_dict(self, *, keep: bool = True) -> dict[str, Any] | None:
        return self.guided.state_dict(keep=keep)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.guided.load_state_dict(state or {})


Gradients = PlainSum | SelfGuidance


def make_gradients(
    config: RunConfig, model: Any, tasks: Sequence[TaskSpec], processes: OneProcess | SeveralProcesses
) -> Gradients:
    """The configured way for `model`, which is on its device.

    Raises:
        ConfigError: the model does not say which parameters the tasks share, or an option does not go with another.
    """
    sgl = config.sgl
    balancer = make_balancer(sgl)
    if balancer is None:
        return PlainSum(model, processes)
    if not (hasattr(model, "shared_parameters") and hasattr(model, "task_parameters")):
        architecture = config.model.get("architecture")
        raise ConfigError(f"sgl.balancer: expected none for the architecture {architecture}, got {sgl.balancer!r}")
    try:
        guided = SelfGuided(
            model.shared_parameters(),
            tasks=[task.name for task in tasks],
            task_parameters=model.task_parameters(),
            balancer=balancer,
            scope=sgl.scope,
            last_shared_layer=model.last_shared_layer() if sgl.scope == "last_shared_layer" else (),
            every=sgl.every,
            beta=sgl.beta,
            direction=sgl.direction,
            weight_beta=sgl.weight_beta,
            statistics=sgl.statistics,
            variance_window=sgl.variance_window,
            control=sgl.control,
            process_group=processes.group,
        )
    except ValueError as error:
        raise ConfigError(f"sgl: {error}") from None
    return SelfGuidance(guided, model)
