"""The parameters a `SelfGuided` was told of, and whether they are all that the losses reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from umda_fast.sgl.batch import NO_FLOAT16
from umda_fast.sgl.distributed import is_sharded
from umda_fast.sgl.graph import Look, Reach


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
        TypeError: something that is neither a Parameter nor a leaf that requires grad.
        ValueError: no trainable shared parameter, one that is both shared and a task's, float16.
    """

    def __init__(self, shared: Iterable[Tensor], others: Iterable[Tensor], layer: Iterable[Tensor]) -> None:
        lists = {"shared_parameters": shared, "task_parameters": others, "last_shared_layer": layer}
        given = {name: _given(name, parameters) for name, parameters in lists.items()}
        self.shared, self.others, self.layer = ([p for p in given[name] if p.requires_grad] for name in lists)
        if not self.shared:
            raise ValueError("shared_parameters: expected a parameter with requires_grad, got none")
        both = {id(p) for p in self.shared} & {id(p) for p in self.others}
        if both:
            raise ValueError(f"task_parameters: expected none of shared_parameters, got {len(both)} of them")
        if any(p.dtype in (torch.float16, torch.complex32) for p in (*self.shared, *self.others, *self.layer)):
            raise ValueError(f"shared_parameters: expected no float16 parameters: {NO_FLOAT16}")
        self.sharded = any(map(is_sharded, self.shared))
        self._frozen = [p for of_list in given.values() for p in of_list if not p.requires_grad]
        self._listed = {id(p): p for of_list in given.values() for p in of_list}
        self._shared = {id(p) for p in self.shared}
        self._checked: set[int] = set()

    def groups(self) -> list[list[Tensor]]:
        """The parameters whose gradients are summed over the processes: shared ones, then all others."""
        others = {id(p): p for p in (*self.layer, *self.others) if id(p) not in self._shared}
        groups = [self.shared, list(others.values())]
        return [[p for p in group if not is_sharded(p)] for group in groups]

    def outside(self, reach: Reach, *, complete: bool) -> list[Tensor]:
        """The leaves that losses reach outside the shared parameters.

        Args:
            complete: whether a Parameter among them has to be listed, as it has to where `task_parameters` are given.

        Raises:
            ValueError: one is not.
        """
        found = [leaf for leaf in reach.leaves if id(leaf) not in self._shared]
        if complete or self.others:
            self._check(found, "" if complete else ", or an empty list to find them")
        return found

    def check_together(self, outputs: Mapping[int, Tensor], look: Look) -> None:
        """That several processes can sum all gradients.

        Args:
            outputs: this process's losses by task, and its penalty (-1).
            look: what they reach; where nobody has looked, the first time a task appears.

        Raises:
            ValueError: a parameter is not listed, was frozen when the buffers were made, or has hooks that would see
                part of the sum.
        """
        if any(p.requires_grad for p in self._frozen):
            raise ValueError(
                "process_group: expected parameters that are trained to have been so when this SelfGuided was made; "
                "make a new one after unfreezing"
            )
        if any(p._post_accumulate_grad_hooks for p in self._listed.values()):
            raise ValueError(
                "process_group: expected no hooks registered by register_post_accumulate_grad_hook, which would see "
                "the gradient of one process only"
            )
        if self.sharded:
            return  # with FSDP2 the graph ends in parameters of its own
        if look.tasks is None and not self._checked.issuperset(outputs):
            look = Look(tasks=Reach(outputs.values()))
        for reach in (look.tasks, look.penalty):
            if reach is not None:
                self.outside(reach, complete=True)
        self._checked.update(outputs)

    def _check(self, found: Sequence[Tensor], remedy: str) -> None:
        missing = [leaf for leaf in found if isinstance(leaf, Parameter) and id(leaf) not in self._listed]
        if not missing:
            return
        shapes = [tuple(leaf.shape) for leaf in missing]
        raise ValueError(
            f"task_parameters: the losses reach {len(missing)} parameters (shapes {shapes[:4]}) that are "
            f"neither here nor in shared_parameters; expected all of them{remedy}"
        )


def _given(name: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters, each once."""
    found: dict[int, Tensor] = {}
    for parameter in parameters:
        leaf = isinstance(parameter, Tensor) and parameter.is_leaf and parameter.requires_grad
        if not leaf and not isinstance(parameter, Parameter):
            raise TypeError(f"{name}: expected Parameters, got {type(parameter).__name__}")
        found.setdefault(id(parameter), parameter)
    return list(found.values())
