"""New tasks on the frozen trunk of a trained model: linear heads on its branches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from umda_fast.model import pretrained
from umda_fast.model.config import UMDAConfig
from umda_fast.model.output import UMDAOutput
from umda_fast.model.specs import MetadataSpec, TaskSpec, ViewSpec, check_distinct
from umda_fast.model.umda import UMDA

__all__ = ["Readout", "ReadoutConfig"]

ARCHITECTURE = "readout"


@dataclass(frozen=True)
class ReadoutConfig:
    """Options of `Readout`.

    Attributes:
        trunk: of the trained model.
        tasks: the new ones.
    """

    trunk: UMDAConfig
    tasks: tuple[TaskSpec, ...]

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return self.trunk.views

    @property
    def metadata(self) -> tuple[MetadataSpec, ...]:
        return self.trunk.metadata


class Readout(nn.Module):
    """`logits_t = W_t f + b_t`, f the trunk's branches of all ITS tasks side by side, [B, T_trunk D], and after them,
    if it has heads of single views, what those read, the mean over its tasks, [B, V D].

    Attention, and what else `UMDAOutput` reports by task, is the mean over the trunk's tasks, the same for every new
    task; the influence matrix is the identity.

    Args:
        trunk: a trained model; frozen here.
        tasks: the new tasks. Heads start at zero; they are fitted in closed form (`umda_fast.studies.readapt`).
    """

    def __init__(self, trunk: UMDA, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        check_distinct("tasks", tasks)
        self.config = ReadoutConfig(trunk.config, tuple(tasks))
        self.trunk = trunk.requires_grad_(False)
        views = len(trunk.config.views) if trunk.config.view_heads else 0
        features = (len(trunk.config.tasks) + views) * trunk.config.width
        self.heads = nn.ModuleList(nn.Linear(features, task.outputs) for task in tasks)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def features(output: UMDAOutput) -> Tensor:
        """f [B, (T_trunk + V) D], V 0 without heads of single views, from what the trunk returned."""
        branches = output.branches.flatten(1)
        if output.view_features is None:
            return branches
        return torch.cat([branches, output.view_features.mean(2).flatten(1).to(branches.dtype)], 1)

    def forward(
        self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None = None, **inputs: Any
    ) -> UMDAOutput:
        """Arguments as of `UMDA.forward`; nothing in the trunk gets a gradient."""
        with torch.no_grad():
            out: UMDAOutput = self.trunk(views, ptr, mask, **inputs)
        features = self.features(out)
        count = len(self.heads)

        def alike(values: Tensor) -> Tensor:
            return values.mean(1, keepdim=True).expand(-1, count)

        return replace(
            out,
            logits={task.name: head(features) for task, head in zip(self.config.tasks, self.heads, strict=True)},
            attention=alike(out.attention),
            attention_entropy=alike(out.attention_entropy),
            influence=torch.eye(count, dtype=out.influence.dtype, device=out.influence.device),
            branches=out.branches.mean(1, keepdim=True).expand(-1, count, -1),
            view_logits=None,
            view_features=None if out.view_features is None else out.view_features.mean(2, keepdim=True),
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json into `directory`; needs the package safetensors."""
        tasks = [asdict(task) for task in self.config.tasks]
        pretrained.save(self, directory, ARCHITECTURE, {"trunk": self.config.trunk.to_dict(), "tasks": tasks})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Readout:
        """The model that `save_pretrained` wrote, on the CPU, in the dtype it had.

        Raises:
            OSError: a file is missing. ValueError: config.json is of another architecture. RuntimeError: the
            weights do not fit.
        """
        values = pretrained.read_options(directory, ARCHITECTURE)
        trunk = UMDA(UMDAConfig.from_dict(values["trunk"]))
        model = cls(trunk, [TaskSpec(**task) for task in values["tasks"]])
        return pretrained.load_weights(model, directory)
