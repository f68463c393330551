"""The parameters a `SelfGuided` was told of, and whether they are all that the losses reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from umda_fast.sgl.batch import NO_FLOAT16
from umda_fast.sgl.distributed import is_sharded
from umda_fast.sgl.graph import reached_leaves


class ParameterLists:
    """Trainable parameters by their place in the model, each once.

    Args:
        shared: those that several tasks train.
        others: heads and branches; empty to have them found, in one process.
        layer: the last shared layer, for the scope of that name.

    Attributes:
        shared, others, layer: lists of what requires grad.
        sharded: whether FSDP2 holds some of the shared ones in shards.

    Raises:
        TypeError: something that is not a Parameter.
        ValueError: no trainable shared parameter, one that is both shared and a task's, float16.
    """

    def __init__(
        self, shared: Iterable[Parameter], others: Iterable[Parameter], layer: Iterable[Parameter]
    ) -> None:
        self.shared = _trainable("shared_parameters", shared)
        self.others = _trainable("task_parameters", others)
        self.layer = _trainable("last_shared_layer", layer)
        if not self.shared:
            raise ValueError("shared_parameters: expected a parameter with requires_grad, got none")
        both = {id(p) for p in self.shared} & {id(p) for p in self.others}
        if both:
            raise ValueError(f"task_parameters: expected none of shared_parameters, got {len(both)} of them")
        if any(p.dtype == torch.float16 for p in (*self.shared, *self.others, *self.layer)):
            raise ValueError(f"shared_parameters: expected no float16 parameters: {NO_FLOAT16}")
        self.sharded = any(map(is_sharded, self.shared))
        self._checked: set[int] = set()

    def groups(self) -> list[list[Parameter]]:
        """The parameters whose gradients are summed over the processes: shared ones, then all others."""
        known = {id(p) for p in self.shared}
        others = {id(p): p for p in (*self.layer, *self.others) if id(p) not in known}
        groups = [self.shared, list(others.values())]
        return [[p for p in group if not is_sharded(p)] for group in groups]

    def unshared(self, losses: Mapping[int, Tensor]) -> list[Parameter]:
        """Parameters outside the shared ones that losses (by task) reach: those given, else found in the graph.

        Raises:
            ValueError: some are given, but not all; looked at the first time a task appears.
        """
        if self.others and self._checked.issuperset(losses):
            return self.others
        known = {id(p) for p in self.shared}
        found = [leaf for leaf in reached_leaves(losses.values()) if id(leaf) not in known]
        if not self.others:
            return found
        self._check(found, self.others, ", or an empty list to find them")
        self._checked.update(losses)
        return self.others

    def check_reached(self, outputs: Mapping[int, Tensor]) -> None:
        """The first time a task appears (-1: a penalty), that all it reaches is in one of the `groups`.

        Raises:
            ValueError: it is not.
        """
        if self.sharded or self._checked.issuperset(outputs):
            return  # with FSDP2 the graph ends in parameters of its own
        self._check(reached_leaves(outputs.values()), [p for group in self.groups() for p in group], "")
        self._checked.update(outputs)

    @staticmethod
    def _check(found: Sequence[Parameter], listed: Sequence[Parameter], remedy: str) -> None:
        missing = {id(leaf) for leaf in found} - {id(p) for p in listed}
        if not missing:
            return
        shapes = [tuple(leaf.shape) for leaf in found if id(leaf) in missing]
        raise ValueError(
            f"task_parameters: the losses reach {len(missing)} parameters (shapes {shapes[:4]}) that are "
            f"neither here nor in shared_parameters; expected all of them{remedy}"
        )


def _trainable(name: str, parameters: Iterable[Parameter]) -> list[Parameter]:
    """The parameters with requires_grad, each once."""
    found: dict[int, Parameter] = {}
    for parameter in parameters:
        if not isinstance(parameter, Parameter):
            raise TypeError(f"{name}: expected Parameters, got {type(parameter).__name__}")
        if parameter.requires_grad:
            found.setdefault(id(parameter), parameter)
    return list(found.values())
