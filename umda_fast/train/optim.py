"""AdamW with its parameter groups, the schedule of the learning rate, and the running mean of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from umda_fast.runtime.config import TrainConfig

__all__ = [
    "WeightAverage",
    "learning_rate_factor",
    "make_optimizer",
    "parameter_groups",
    "restore_optimizer",
    "set_learning_rate",
]


class WeightAverage(AveragedModel):
    """A model whose parameters are the running mean of those of `model`, taken in by `update_parameters` after each
    update; buffers are the latest.

    Args:
        model: is copied.
        decay: of the mean; `auto`: `min(.98, (1 + t) / (10 + t))` after t updates, which forgets the beginning, so that
            the mean follows closely while the weights still move fast.
    """

    def __init__(self, model: nn.Module, decay: float | Literal["auto"]) -> None:
        super().__init__(model, multi_avg_fn=self._average)
        self.decay = decay
        self._done: int | None = 0  # `n_averaged` on the host, which would wait for a device; None: to be read

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the parameters of `model` in; its buffers replace those here. A call each, however many there are."""
        mean, new = ([x.detach() for x in one.parameters()] for one in (self.module, model))
        done = self._updates()
        if done == 0:
            torch._foreach_copy_(mean, new)
        else:
            self._average(mean, new, done)
        kept, buffers = list(self.module.buffers()), list(model.buffers())
        if kept:
            torch._foreach_copy_(kept, buffers)
        self.n_averaged += 1
        self._done = done + 1

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; the number of updates is one of the buffers."""
        found = super().load_state_dict(*args, **kwargs)
        self._done = None
        return found

    def _updates(self) -> int:
        if self._done is None:
            self._done = int(self.n_averaged)
        return self._done

    @torch.no_grad()
    def _average(self, mean: Any, new: Any, updates: Any) -> None:
        torch._foreach_lerp_(mean, new, 1.0 - self._decay_now())

    def _decay_now(self) -> float:
        if self.decay != "auto":
            return self.decay
        done = self._updates()
        return min(0.98, (1 + done) / (10 + done))


def make_optimizer(
    model: nn.Module, options: TrainConfig, averaged: Iterable[nn.Parameter] = (), beta: float = 0.0
) -> torch.optim.AdamW:
    """AdamW for all trainable parameters of `model`; `averaged` and `beta` as for `parameter_groups`. Where PyTorch has
    it, as one fused call for each group, not several for each parameter."""
    groups = parameter_groups(model, options.weight_decay, averaged, beta)
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    # False would not mean its absence but a choice against foreach.
    return torch.optim.AdamW(groups, lr=options.lr, fused=True if fused else None)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)`, where the state may be of an optimiser that computed the same in other calls
    (not fused, before version 0.2).

    Raises:
        ValueError, KeyError: it is of other parameters.
    """
    fused = optimizer.defaults["fused"]
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


def set_learning_rate(optimizer: torch.optim.Optimizer, options: TrainConfig, progress: float) -> float:
    """Set, and return, the learning rate at `progress` in [0, 1] of the training; a group's `scale` is a factor on
    its own."""
    lr = options.lr * learning_rate_factor(progress, options.warmup, options.final_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def parameter_groups(
    model: nn.Module, weight_decay: float, averaged: Iterable[nn.Parameter] = (), beta: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices with `weight_decay`, all else (biases, norms, embeddings, gates) without.

    A parameter decays if it has at least two dimensions and belongs neither to a norm nor to an embedding; a
    bare parameter counts as an embedding when its name says so. The parameters in `averaged` get gradients
    that are running means with decay `beta` already, so the optimiser's own (the first of `betas`) is switched
    off for them. A mean of independent gradients is shorter than they are, by `sqrt((1 - beta) / (1 + beta))`,
    and Adam, which divides by the length of what it is given, would make longer steps of it: `scale`, a factor on
    the group's learning rate, undoes that, and leaves the weight decay of a step as it is.
    """
    plain: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in type(module).__name__.lower():
            plain.update(id(p) for p in module.parameters(recurse=False))
    averages = {id(parameter) for parameter in averaged}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rsplit(".", 1)[-1]
        decays = (
            parameter.ndim >= 2 and id(parameter) not in plain and "bias" not in leaf and "embed" not in leaf
        )
        groups.setdefault((decays, id(parameter) in averages), []).append(parameter)
    shorter = math.sqrt((1.0 - beta) / (1.0 + beta))
    return [
        {
            "params": groups[key],
            "weight_decay": (weight_decay if key[0] else 0.0) / (shorter if key[1] else 1.0),
            "betas": (0.0 if key[1] else 0.9, 0.999),
            "scale": shorter if key[1] else 1.0,
        }
        for key in sorted(groups, reverse=True)
    ]


def learning_rate_factor(progress: float, warmup: float, final: float) -> float:
    """Factor on the learning rate at `progress` in [0, 1] of the training: linear from 0 over `warmup`, then
    a cosine down to `final`."""
    if progress < warmup:
        return progress / warmup
    if progress >= 1.0 or warmup >= 1.0:
        return final if progress >= 1.0 else 1.0
    angle = math.pi * (progress - warmup) / (1.0 - warmup)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(angle))
