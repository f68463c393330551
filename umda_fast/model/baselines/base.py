"""What the plain models have in common: options, output, the encoder of instances, training, saving."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model import pretrained
from umda_fast.model.encoders import ViewEncoders
from umda_fast.model.specs import TaskSpec, ViewSpec, check_distinct

__all__ = ["Baseline", "BaselineConfig", "BaselineOutput", "InstanceEncoder", "OneEncoder", "Pooled"]


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


class Pooled(NamedTuple):
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

    def forward(
        self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None = None, *unused: Any, **further: Any
    ) -> BaselineOutput:
        """Views {name: [N, width]}, ptr int64 [B+1], mask bool [N, V]; what `UMDA` takes beyond them (coordinates,
        metadata) is not used."""
        return self.predict(views, ptr, mask)

    @abstractmethod
    def predict(self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None) -> BaselineOutput:
        """As `forward`."""

    @abstractmethod
    def task_parameters(self) -> list[nn.Parameter]:
        """Heads, and what else belongs to a task alone."""

    @abstractmethod
    def last_shared_layer(self) -> list[nn.Parameter]:
        """The last layer of the encoder of instances."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json into `directory`; needs the package safetensors."""
        pretrained.save(self, directory, self.architecture, self.config.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """The model that `save_pretrained` wrote, on the CPU, in the dtype it had.

        Raises:
            OSError: a file is missing. ValueError: config.json is of another architecture. RuntimeError: the
            weights do not fit.
        """
        options = pretrained.read_options(directory, cls.architecture)
        return pretrained.load_weights(cls(cls.config_class(**options)), directory)


class OneEncoder(Baseline):
    """Encoder of instances, `pool`, `share`, a linear head per task."""

    _own: ClassVar[tuple[str, ...]] = ("heads",)  # submodules whose parameters belong to the tasks

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = InstanceEncoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.ModuleList(nn.Linear(config.width, task.outputs) for task in config.tasks)

    @abstractmethod
    def pool(self, z: Tensor, ptr: Tensor) -> Pooled:
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

    def predict(self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None) -> BaselineOutput:
        return self.from_instances(self.encoder(views, mask), ptr)

    def task_parameters(self) -> list[nn.Parameter]:
        """Heads, and what else belongs to a task alone."""
        return [parameter for name in self._own for parameter in self.get_submodule(name).parameters()]

    def last_shared_layer(self) -> list[nn.Parameter]:
        """The last layer of the encoder of instances."""
        return self.encoder.last_layer()
