"""A plain model to compare with: gated-attention pooling of one view, one pooling and one head per task.

Source of the pooling: Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", ICML
2018.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from umda_fast.model.specs import TaskSpec, ViewSpec, check_distinct
from umda_fast.ops import bag_attention_pool

__all__ = ["GatedAttention", "GatedAttentionConfig", "GatedAttentionOutput"]


@dataclass(frozen=True)
class GatedAttentionConfig:
    """Options of `GatedAttention`.

    Attributes:
        views, tasks: as the data has them.
        view: the view used; None takes the first.
        width: of the instance representation.
        hidden: of the attention's shared hidden units.
        dropout: after the encoder.
    """

    views: tuple[ViewSpec, ...]
    tasks: tuple[TaskSpec, ...]
    view: str | None = None
    width: int = 128
    hidden: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(_spec(ViewSpec, view) for view in self.views))
        object.__setattr__(self, "tasks", tuple(_spec(TaskSpec, task) for task in self.tasks))
        check_distinct("views", self.views)
        check_distinct("tasks", self.tasks)
        names = [view.name for view in self.views]
        if not names or not self.tasks:
            raise ValueError(
                f"expected at least one view and one task, got {len(names)} and {len(self.tasks)}"
            )
        if self.view is not None and self.view not in names:
            raise ValueError(f"view: expected one of {', '.join(names)}, got {self.view!r}")
        if self.width < 1 or self.hidden < 1:
            raise ValueError(f"width, hidden: expected at least 1, got {self.width}, {self.hidden}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected at least 0 and below 1, got {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _spec(kind: type[Any], value: Any) -> Any:
    return kind(**value) if isinstance(value, Mapping) else value


@dataclass
class GatedAttentionOutput:
    """`logits` {task: [B, outputs]}, `attention` [N, T], `attention_entropy` [B, T]; `penalties` is empty."""

    logits: dict[str, Tensor]
    attention: Tensor
    attention_entropy: Tensor
    penalties: dict[str, Tensor]


class GatedAttention(nn.Module):
    """Encoder of one view, gated attention with one pooling per task, a linear head per task.

    `forward` takes what `UMDA.forward` takes and uses one view of it; an instance without that view enters
    with zeros as features, as the batch holds them.
    """

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.view = config.view if config.view is not None else config.views[0].name
        features = next(view.width for view in config.views if view.name == self.view)
        self.encoder = nn.Sequential(
            nn.LayerNorm(features),
            nn.Linear(features, config.width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, config.width),
            nn.GELU(),
        )
        self.attention_value = nn.Linear(config.width, config.hidden)
        self.attention_gate = nn.Linear(config.width, config.hidden)
        self.attention_score = nn.Linear(config.hidden, len(config.tasks))
        self.heads = nn.ModuleList(nn.Linear(config.width, task.outputs) for task in config.tasks)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json into `directory`."""
        from safetensors.torch import save_file

        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, place / "model.safetensors")
        text = json.dumps({"architecture": "gated_attention", **self.config.to_dict()}, indent=2)
        (place / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> GatedAttention:
        """The model that `save_pretrained` wrote, on the CPU.

        Raises:
            OSError: a file is missing. ValueError: config.json is of another architecture.
        """
        from safetensors.torch import load_file

        place = Path(directory)
        values = json.loads((place / "config.json").read_text(encoding="utf-8"))
        architecture = values.pop("architecture", None)
        if architecture != "gated_attention":
            raise ValueError(f"config.json: architecture: expected gated_attention, got {architecture!r}")
        model = cls(GatedAttentionConfig(**values))
        model.load_state_dict(load_file(place / "model.safetensors"))
        return model

    def forward(
        self,
        views: Mapping[str, Tensor],
        ptr: Tensor,
        mask: Tensor | None = None,
        coords: Tensor | None = None,
    ) -> GatedAttentionOutput:
        """Views {name: [N, width]}, ptr int64 [B+1]; `mask` and `coords` are accepted and not used."""
        z = self.encoder(views[self.view])
        hidden = torch.tanh(self.attention_value(z)) * torch.sigmoid(self.attention_gate(z))
        scores = self.attention_score(hidden)
        pool = bag_attention_pool(z, scores, ptr)
        logits = {
            task.name: head(pool.pooled[:, t])
            for t, (task, head) in enumerate(zip(self.config.tasks, self.heads, strict=True))
        }
        bag = torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.diff())
        attention = torch.exp(scores.float() - pool.lse[bag])
        return GatedAttentionOutput(logits, attention, pool.entropy, {})
