"""Plain models to compare with, in the same trainer: one way each to fuse views, pool a bag and share between tasks.

All standardise and encode views as `UMDA` does; `view=None` takes all views, each encoded and then concatenated, or
one by name. They name their shared parameters, so every balancer works with them; penalties there are none.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model.encoders import ViewEncoders
from umda_fast.model.experts import ExpertGates
from umda_fast.model.gmip import BagPooling, bag_index
from umda_fast.model.specs import TaskSpec, ViewSpec, check_distinct
from umda_fast.ops import bag_attention_pool

__all__ = [
    "BASELINES",
    "PLE",
    "Baseline",
    "BaselineConfig",
    "BaselineOutput",
    "ExpertsConfig",
    "GatedAttention",
    "GatedAttentionConfig",
    "HardSharing",
    "LateFusion",
    "LateFusionConfig",
    "MMoE",
    "MaxPooling",
    "MeanPooling",
    "TransMIL",
    "TransMILConfig",
]


@dataclass(frozen=True)
class BaselineConfig:
    """Options that every baseline has.

    Attributes:
        views, tasks: as the data has them; mappings with their fields are taken as well.
        view: the only view used; None takes all, by concatenation.
        width: of the instance representation.
        dropout: in the encoders and before the heads.
    """

    views: tuple[ViewSpec, ...]
    tasks: tuple[TaskSpec, ...]
    view: str | None = None
    width: int = 128
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(_spec(ViewSpec, view) for view in self.views))
        object.__setattr__(self, "tasks", tuple(_spec(TaskSpec, task) for task in self.tasks))
        check_distinct("views", self.views)
        check_distinct("tasks", self.tasks)
        names = [view.name for view in self.views]
        if not names or not self.tasks:
            raise ValueError(f"expected at least one view and one task, got {len(names)} and {len(self.tasks)}")
        if self.view is not None and self.view not in names:
            raise ValueError(f"view: expected one of {', '.join(names)}, got {self.view!r}")
        for name in self._counts():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected at least 0 and below 1, got {self.dropout}")

    def _counts(self) -> tuple[str, ...]:
        """Options that must be at least 1."""
        return ("width",)

    @property
    def used(self) -> tuple[ViewSpec, ...]:
        """The views the model reads."""
        return tuple(view for view in self.views if self.view in (None, view.name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class GatedAttentionConfig(BaselineConfig):
    """`hidden`: units of the attention."""

    hidden: int = 64

    def _counts(self) -> tuple[str, ...]:
        return ("width", "hidden")


@dataclass(frozen=True)
class LateFusionConfig(GatedAttentionConfig):
    """As `GatedAttentionConfig`, of every view's model; takes all views."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.view is not None:
            raise ValueError(f"view: late fusion takes all views, expected None, got {self.view!r}")

    def of_view(self, view: ViewSpec) -> GatedAttentionConfig:
        """The configuration of the model of `view`."""
        return GatedAttentionConfig((view,), self.tasks, width=self.width, dropout=self.dropout, hidden=self.hidden)


@dataclass(frozen=True)
class TransMILConfig(BaselineConfig):
    """`heads`, `layers`: of the transformer."""

    heads: int = 4
    layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width = {self.width}, got {self.heads}")

    def _counts(self) -> tuple[str, ...]:
        return ("width", "heads", "layers")


@dataclass(frozen=True)
class ExpertsConfig(GatedAttentionConfig):
    """`experts`: shared ones; PLE adds one of each task's own."""

    experts: int = 4

    def _counts(self) -> tuple[str, ...]:
        return ("width", "hidden", "experts")


def _spec(kind: type[Any], value: Any) -> Any:
    return kind(**value) if isinstance(value, Mapping) else value


@dataclass
class BaselineOutput:
    """`logits` {task: [B, outputs]}, `attention` [N, T] (sums to 1 over a bag; what the model weighs instances by),
    `attention_entropy` [B, T], `representation` [N, D]; `penalties` is empty."""

    logits: dict[str, Tensor]
    attention: Tensor
    attention_entropy: Tensor
    representation: Tensor
    penalties: dict[str, Tensor]


class _Pooled(NamedTuple):
    vectors: Tensor  # [B, T, D]
    attention: Tensor  # [N, T]
    entropy: Tensor  # [B, T]


class InstanceEncoder(nn.Module):
    """Views to one vector per instance: encoders, and with several views a linear layer on their concatenation, in
    which a missing view is zero."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.columns = [index for index, view in enumerate(config.views) if view in config.used]
        self.encoders = ViewEncoders(config.used, config.width, dropout=config.dropout)
        several = len(config.used) > 1
        self.mix = nn.Linear(len(config.used) * config.width, config.width) if several else nn.Identity()

    def forward(self, views: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
        """Returns [N, D]."""
        x = self.encoders(views, None if mask is None else mask[:, self.columns])
        return F.gelu(self.mix(F.gelu(x).flatten(1)))

    def last_layer(self) -> list[nn.Parameter]:
        """Weight and bias."""
        last = self.mix if isinstance(self.mix, nn.Linear) else list(self.encoders.encoders.modules())[-1]
        return list(last.parameters())


class Baseline(nn.Module):
    """What every model here can do: be trained like `UMDA`, be saved and read back."""

    architecture: ClassVar[str]
    config_class: ClassVar[type[BaselineConfig]] = BaselineConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def shared_parameters(self) -> list[nn.Parameter]:
        """All but those of `task_parameters`."""
        own = {id(parameter) for parameter in self.task_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    @abstractmethod
    def task_parameters(self) -> list[nn.Parameter]:
        """Heads, and what else belongs to a task alone."""

    @abstractmethod
    def last_shared_layer(self) -> list[nn.Parameter]:
        """The last layer of the encoder of instances."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json into `directory`; needs the package safetensors."""
        from safetensors.torch import save_file

        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, place / "model.safetensors")
        text = json.dumps({"architecture": self.architecture, **self.config.to_dict()}, indent=2)
        (place / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """The model that `save_pretrained` wrote, on the CPU.

        Raises:
            OSError: a file is missing. ValueError: config.json is of another architecture.
        """
        from safetensors.torch import load_file

        place = Path(directory)
        values = json.loads((place / "config.json").read_text(encoding="utf-8"))
        architecture = values.pop("architecture", None)
        if architecture != cls.architecture:
            raise ValueError(f"config.json: architecture: expected {cls.architecture}, got {architecture!r}")
        model = cls(cls.config_class(**values))
        model.load_state_dict(load_file(place / "model.safetensors"))
        return model


class _OneEncoder(Baseline):
    """Encoder of instances, `pool`, `share`, a linear head per task."""

    _own: ClassVar[tuple[str, ...]] = ("heads",)  # submodules whose parameters belong to the tasks

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = InstanceEncoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.ModuleList(nn.Linear(config.width, task.outputs) for task in config.tasks)

    @abstractmethod
    def pool(self, z: Tensor, ptr: Tensor) -> _Pooled:
        """z [N, D] to one vector per bag and task (T may be 1 for a vector that all tasks share)."""

    def share(self, pooled: Tensor) -> Tensor:
        """What lies between pooling and heads, [B, T, D] -> [B, T, D]."""
        return pooled

    def from_instances(self, z: Tensor, ptr: Tensor) -> BaselineOutput:
        """All that follows the encoder, for z [N, D]."""
        pooled, attention, entropy = self.pool(z, ptr)
        tasks = len(self.config.tasks)
        vectors = self.dropout(self.share(pooled.expand(-1, tasks, -1)))
        logits = {
            task.name: head(vectors[:, t])
            for t, (task, head) in enumerate(zip(self.config.tasks, self.heads, strict=True))
        }
        return BaselineOutput(logits, attention.expand(-1, tasks), entropy.expand(-1, tasks), z, {})

    def forward(
        self,
        views: Mapping[str, Tensor],
        ptr: Tensor,
        mask: Tensor | None = None,
        coords: Tensor | None = None,
        *,
        metadata: Tensor | None = None,
    ) -> BaselineOutput:
        """Views {name: [N, width]}, ptr int64 [B+1], mask bool [N, V]; `coords` and `metadata` are not used."""
        return self.from_instances(self.encoder(views, mask), ptr)

    def task_parameters(self) -> list[nn.Parameter]:
        """Heads, and what else belongs to a task alone."""
        return [parameter for name in self._own for parameter in self.get_submodule(name).parameters()]

    def last_shared_layer(self) -> list[nn.Parameter]:
        """The last layer of the encoder of instances."""
        return self.encoder.last_layer()


class MeanPooling(_OneEncoder):
    """Mean of a bag's instances, shared by all tasks."""

    architecture = "mean_pooling"

    def pool(self, z: Tensor, ptr: Tensor) -> _Pooled:
        scores = z.new_zeros(len(z), 1)  # equal scores: the softmax is a mean
        pool = bag_attention_pool(z, scores, ptr)
        attention = torch.exp(-pool.lse)[bag_index(ptr, len(z))]
        return _Pooled(pool.pooled, attention, pool.entropy)


class MaxPooling(_OneEncoder):
    """Maximum of every feature over a bag's instances; zero for an empty bag.

    `attention` is the share of the features whose maximum an instance holds.
    """

    architecture = "max_pooling"

    def pool(self, z: Tensor, ptr: Tensor) -> _Pooled:
        bag, (bags, width) = bag_index(ptr, len(z)), (len(ptr) - 1, z.shape[1])
        index = bag[:, None].expand(-1, width)
        pooled = z.new_zeros(bags, width).scatter_reduce(0, index, z, "amax", include_self=False)
        with torch.no_grad():
            holds = (z == pooled[bag]).to(z.dtype)
            holders = z.new_zeros(bags, width).index_add(0, bag, holds)
            share = (holds / holders[bag].clamp_min(1.0)).mean(1)
            surprise = -torch.xlogy(share, share)
            entropy = share.new_zeros(bags).index_add(0, bag, surprise)
        return _Pooled(pooled[:, None], share[:, None], entropy[:, None])


class GatedAttention(_OneEncoder):
    """Gated attention pooling, one per task over shared hidden units.

    Source: Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", ICML 2018.
    """

    architecture = "gated_attention"
    config_class = GatedAttentionConfig
    _own = ("attention.score", "heads")

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        self.attention = BagPooling(config.width, len(config.tasks), config.hidden)

    def pool(self, z: Tensor, ptr: Tensor) -> _Pooled:
        found = self.attention(z, ptr)
        return _Pooled(found.pooled, found.attention, found.entropy)


class _OneAttention(_OneEncoder):
    """Gated attention pooling into one vector that all tasks share."""

    config_class = GatedAttentionConfig

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        self.attention = BagPooling(config.width, 1, config.hidden)

    def pool(self, z: Tensor, ptr: Tensor) -> _Pooled:
        found = self.attention(z, ptr)
        return _Pooled(found.pooled, found.attention, found.entropy)


class HardSharing(_OneAttention):
    """One pooling and two hidden layers for all tasks, a head for each.

    Source: Caruana, "Multitask learning", Machine Learning 28, 1997.
    """

    architecture = "hard_sharing"

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        width = config.width
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())

    def share(self, pooled: Tensor) -> Tensor:
        shared: Tensor = self.trunk(pooled)
        return shared


class MMoE(_OneAttention):
    """One pooling, experts for all tasks, a gate per task (see `ExpertGates`)."""

    architecture = "mmoe"
    config_class = ExpertsConfig
    _private = 0

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__(config)
        self.experts = ExpertGates(config.width, len(config.tasks), config.experts, self._private)

    def share(self, pooled: Tensor) -> Tensor:
        shared: Tensor = self.experts(pooled)
        return shared

    def task_parameters(self) -> list[nn.Parameter]:
        """Heads, gates and private experts."""
        return [*super().task_parameters(), self.experts.gate, *self.experts.private.parameters()]


class PLE(MMoE):
    """As `MMoE`, with one further expert of each task's own (see `ExpertGates`)."""

    architecture = "ple"
    _private = 1


class TransMIL(_OneEncoder):
    """Self-attention between the instances of a bag and a class token, which is the bag's vector.

    After Shao et al., "TransMIL: Transformer based correlated multiple instance learning", NeurIPS 2021; with exact
    softmax attention in place of the Nyström approximation and without its convolutions over positions. Memory grows
    with the square of the largest bag.
    """

    architecture = "transmil"
    config_class = TransMILConfig

    def __init__(self, config: TransMILConfig) -> None:
        super().__init__(config)
        width = config.width
        self.token_embedding = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, 2 * width, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.layers - 1)
        )
        self.norm = nn.LayerNorm(width)
        self.read = nn.MultiheadAttention(width, config.heads, batch_first=True)

    def pool(self, z: Tensor, ptr: Tensor) -> _Pooled:
        bag, sizes = bag_index(ptr, len(z)), ptr.diff()
        longest = int(sizes.max()) if len(sizes) else 0
        place = torch.arange(len(z), device=z.device) - ptr[bag] + 1
        x = z.new_zeros(len(sizes), longest + 1, z.shape[1]).index_put((bag, place), z)
        x = torch.cat([self.token_embedding.to(z.dtype).expand(len(x), 1, -1), x[:, 1:]], dim=1)
        absent = torch.arange(longest + 1, device=z.device) > sizes[:, None]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=absent)
        x = self.norm(x)
        read, weights = self.read(x[:, :1], x, x, key_padding_mask=absent)
        seen = weights[:, 0, 1:]
        seen = seen / seen.sum(1, keepdim=True).clamp_min(torch.finfo(seen.dtype).tiny)
        entropy = -torch.xlogy(seen, seen).sum(1, keepdim=True)
        return _Pooled(read + x[:, :1], seen[bag, place - 1][:, None], entropy)


class LateFusion(Baseline):
    """A `GatedAttention` for every view, over the instances that have it; the logits of the views that a bag has are
    averaged, and the loss is that of the average."""

    architecture = "late_fusion"
    config_class = LateFusionConfig

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__(config)
        self.models = nn.ModuleList(GatedAttention(config.of_view(view)) for view in config.views)

    def forward(
        self,
        views: Mapping[str, Tensor],
        ptr: Tensor,
        mask: Tensor | None = None,
        coords: Tensor | None = None,
        *,
        metadata: Tensor | None = None,
    ) -> BaselineOutput:
        """As of the other baselines; `representation` [N, V * D]."""
        models, names = self._gated(), [view.name for view in self.config.views]
        z = torch.cat([model.encoder({name: views[name]}, None) for name, model in zip(names, models, strict=True)], 1)
        n, bags, bag = len(z), len(ptr) - 1, bag_index(ptr, len(z))
        outputs, present, attention = [], [], []
        for column, (model, own) in enumerate(zip(models, z.split(self.config.width, dim=1), strict=True)):
            rows = torch.arange(n, device=ptr.device) if mask is None else mask[:, column].nonzero().flatten()
            own_ptr = torch.searchsorted(rows, ptr)
            out = model.from_instances(own[rows], own_ptr)
            outputs.append(out)
            present.append((own_ptr.diff() > 0).to(z.dtype))
            attention.append(out.attention.new_zeros(n, len(self.config.tasks)).index_copy(0, rows, out.attention))
        share = torch.stack(present)  # [V, B]
        share = share / share.sum(0).clamp_min(1.0)
        logits = {
            task.name: (torch.stack([out.logits[task.name] for out in outputs]) * share[..., None]).sum(0)
            for task in self.config.tasks
        }
        weights = (torch.stack(attention) * share[:, bag, None]).sum(0)
        entropy = weights.new_zeros(bags, weights.shape[1]).index_add(0, bag, -torch.xlogy(weights, weights))
        return BaselineOutput(logits, weights, entropy, z, {})

    def task_parameters(self) -> list[nn.Parameter]:
        """Those of the views' models."""
        return [parameter for model in self._gated() for parameter in model.task_parameters()]

    def last_shared_layer(self) -> list[nn.Parameter]:
        """The last layers of the views' encoders."""
        return [parameter for model in self._gated() for parameter in model.last_shared_layer()]

    def _gated(self) -> list[GatedAttention]:
        return [model for model in self.models if isinstance(model, GatedAttention)]


BASELINES: dict[str, Any] = {
    model.architecture: model
    for model in (MeanPooling, MaxPooling, GatedAttention, TransMIL, HardSharing, MMoE, PLE, LateFusion)
}
"""Architecture -> class."""
