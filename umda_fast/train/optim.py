"""AdamW's parameter groups, the schedule of the learning rate, and the random states an exact resume
needs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["learning_rate_factor", "parameter_groups", "random_state", "set_random_state"]


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


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's random generators as plain values and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is what others draw from
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
