"""A trained trunk for other tasks: weights carried over, and low-rank adapters to train in place of the trunk.

Source of the adapters: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from umda_fast.model.specs import TaskSpec
from umda_fast.model.umda import UMDA

__all__ = ["add_adapters", "merge_adapters", "transfer"]


class _LowRank(nn.Module):
    """`W + B A` with B zero to begin with."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.read = nn.Parameter(torch.randn_like(weight[:1].expand(rank, columns)) / math.sqrt(columns))
        self.write = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.write @ self.read


def add_adapters(module: nn.Module, rank: int = 4) -> list[nn.Parameter]:
    """Freeze all parameters of `module` and give every linear layer in it a low-rank correction to train instead:
    its weight becomes `W + B A`, A [rank, inputs], B [outputs, rank], B = 0 to begin with.

    Only layers larger than their correction get one. The gains of a `UMDA` stay as training left them: a block whose
    gains are still 0, as in a model that was never trained, adds nothing with a correction either. `merge_adapters`
    turns the sums into plain weights again, which saving needs.

    Args:
        module: changed in place; for a `UMDA` give its parts (`model.encoders`, `model.hcva`, ...).
        rank: of the corrections, at least 1.

    Returns:
        The new parameters.

    Raises:
        ValueError: rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    added: list[nn.Parameter] = []
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        if rank * (layer.in_features + layer.out_features) < layer.weight.numel():
            adapter = _LowRank(layer.weight.detach(), rank)
            parametrize.register_parametrization(layer, "weight", adapter)
            added += adapter.parameters()
    return added


def merge_adapters(module: nn.Module) -> nn.Module:
    """Replace every `W + B A` in `module` by its sum, in place; parameters stay frozen. Returns `module`."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
            layer.weight.requires_grad_(False)
    return module


def transfer(model: UMDA, tasks: Sequence[TaskSpec]) -> UMDA:
    """A new model for other tasks with the trunk of `model`: copies of `model.shared_parameters()`; scores of the
    pooling, private paths, influence, norms and heads start anew, drawn from torch's global generator. A hierarchy
    of the old tasks is dropped.
    """
    config = replace(model.config, tasks=tuple(tasks), hierarchy=None)
    encoders = {
        view.name: copy.deepcopy(encoder)
        for view, encoder in zip(model.encoders.views, model.encoders.encoders, strict=True)
        if view.name in model.encoders.custom
    }
    result = UMDA(config, encoders)
    shared = {id(parameter) for parameter in model.shared_parameters()}
    kept = {name for name, parameter in model.named_parameters() if id(parameter) in shared}
    kept |= {name for name, _ in model.named_buffers() if not name.startswith("atsb.")}
    state = {name: value for name, value in model.state_dict().items() if name in kept}
    result.load_state_dict({**result.state_dict(), **state})
    return result
