"""Options of `UMDA`: a frozen dataclass of plain values, JSON-able, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from umda_fast.model.specs import MetadataSpec, TaskSpec, ViewSpec, check_distinct
from umda_fast.ops.cross_view import MAX_HEAD_DIM, MAX_VIEWS, MIN_HEAD_DIM
from umda_fast.tasks.checks import as_float, as_tuple, check_int

Message: TypeAlias = Literal["attention", "mean", "none"]
MessageNorm: TypeAlias = Literal["post", "pre"]
Branching: TypeAlias = Literal["dual", "mmoe", "ple"]

_AT_LEAST = {
    "width": 1,
    "heads": 1,
    "layers": 1,
    "ffn": 1,
    "graph_k": 1,
    "graph_width": 1,
    "graph_layers": 0,
    "message_ffn": 0,
    "coords_k": 0,
    "task_embedding": 1,
    "experts": 1,
    "private_experts": 1,
    "chunk": 0,
    "bins": 0,
}
_AT_LEAST_OR_NONE = ("encoder_hidden", "pool_hidden", "private_rank")
_SWITCHES = (
    "symmetrize",
    "graph",
    "private",
    "scale_wide",
    "whole_inputs",
    "linear_path",
    "bag_statistics",
    "view_heads",
)
VERSION = 2
"""Of what `UMDAConfig.to_dict` writes."""
BEFORE_2: dict[str, Any] = {
    "hcva": True,
    "layer_scale": None,
    "message_norm": "post",
    "message_ffn": 0,
    "view_heads": False,
    "scale_wide": False,
    "whole_inputs": False,
    "bag_statistics": False,
}
"""Options that there were not, or that had another default, before version 2: what was then done."""


@dataclass(frozen=True)
class UMDAConfig:
    """Options of `UMDA`; formulas and symbols are those of docs/model.md, which says how to have the model as it was
    before there were some of them.

    Attributes:
        views, tasks: as the data has them, at most 16 views; mappings with their fields are taken as well.
        width: D, width of the model.
        heads: H, of both attentions; divides `width`, with a quotient in 8..256.
        layers: L_v, cross-view attention blocks.
        ffn: hidden width of a block's feed-forward part, in multiples of `width`.
        layer_scale: at which the gains of what blocks and messages add to their input begin, one for every one of
            `width` dimensions (LayerScale): at 0, the default, they begin as if they were not there. None has no gains.
        dropout: in the encoders, after attention, messages and feed-forward parts, and before the heads.
        encoder_hidden: hidden width of a default encoder; None takes `width`.
        input_dropout: of the features that a default encoder is given: for few bags with many features.
        linear_path: add to the logits a regularised linear map of each bag's mean features, see `LinearPath`: for
            many weak features and few bags.
        scale_wide: whether default encoders of wide features begin with a smaller gain, see `FeatureEncoder`.
        whole_inputs: default encoders squash outliers and also read the mean and the size of a row of features, which
            their LayerNorm takes away, see `FeatureEncoder`.
        bins: default encoders also read every feature by its quantiles over the training instances, so many bins each,
            see `QuantileBins`: for features whose effect is not linear, with few bags. It takes so many times the
            memory of the features. 0 has none.
        graph_k: neighbours of an instance.
        graph_width: width of r, by which neighbours are chosen.
        graph_tau: tau of the edge weights exp((cos - 1) / tau).
        graph_layers: L_g, rounds of message passing.
        message: `attention`, `mean` (by edge weights) or `none` (the graph then serves its penalty only).
        message_norm: `pre`, of what messages are made of, or `post`, of the sum of instance and message.
        message_ffn: hidden width of a feed-forward part after every round of messages, in multiples of `width`, with
            `message_norm="pre"`; 0 has none.
        symmetrize: whether an edge also runs back.
        coords_k: neighbours by coordinates, united with the others; 0 uses no coordinates, more needs them.
        bag_statistics: branches also read the mean and the maximum of every dimension of a bag's instances.
        view_heads: add to the logits of a task what every view alone says, see `ViewHeads`.
        pool_hidden: hidden units of the attention scores; None takes `width // 2`, at least 1.
        private_rank: r, of a task's private path; None takes `width // 8`, at least 1.
        task_embedding: d_c, width of the task embeddings.
        kappa: weight of the hierarchy in the influence matrix.
        kappa_g: weight of the tasks' gradient cosines in it.
        hierarchy: tree distances between the tasks, [T][T]; None for no hierarchy.
        branching: `dual` (shared path and private low-rank paths), or in place of the private paths the expert gates
            `mmoe` (shared experts) or `ple` (shared experts and some of each task's own).
        experts: shared experts of `mmoe` and `ple`.
        private_experts: a task's own experts of `ple`.
        metadata: numbers known of a bag beside its instances; they condition the pooled bag (FiLM). Mappings with
            their fields are taken as well.
        delta: margin between the means of two views (dispersion).
        gamma: margin of the standard deviation inside a bag (diversity).
        chunk: with more instances than this in a batch, encoders and cross-view attention run on so many at a time,
            and in training they run again in the backward pass instead of keeping their activations: less memory for a
            third more time. 0 never.
        hcva: whether there is cross-view attention; `auto`: if there is more than one view. True with one view has
            its feed-forward parts only.
        graph, private: switch off the graph, or the private paths.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    views: tuple[ViewSpec, ...]
    tasks: tuple[TaskSpec, ...]
    width: int = 128
    heads: int = 4
    layers: int = 2
    ffn: int = 2
    layer_scale: float | None = 0.0
    dropout: float = 0.25
    encoder_hidden: int | None = None
    input_dropout: float = 0.0
    scale_wide: bool = True
    whole_inputs: bool = True
    bins: int = 0
    linear_path: bool = False
    graph_k: int = 8
    graph_width: int = 64
    graph_tau: float = 0.5
    graph_layers: int = 2
    message: Message = "attention"
    message_norm: MessageNorm = "pre"
    message_ffn: int = 0
    symmetrize: bool = False
    coords_k: int = 0
    bag_statistics: bool = True
    view_heads: bool = False
    pool_hidden: int | None = None
    private_rank: int | None = None
    task_embedding: int = 16
    kappa: float = 1.0
    kappa_g: float = 0.0
    hierarchy: tuple[tuple[float, ...], ...] | None = None
    branching: Branching = "dual"
    experts: int = 4
    private_experts: int = 1
    metadata: tuple[MetadataSpec, ...] = ()
    delta: float = 1.0
    gamma: float = 0.5
    chunk: int = 0
    hcva: bool | Literal["auto"] = "auto"
    graph: bool = True
    private: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("views", ViewSpec), ("tasks", TaskSpec), ("metadata", MetadataSpec)):
            specs = _specs(name, kind, getattr(self, name))
            if not specs and name != "metadata":
                raise ValueError(f"UMDAConfig.{name}: expected at least one, got none")
            object.__setattr__(self, name, specs)
            check_distinct(f"UMDAConfig.{name}", specs)
        for name, least in _AT_LEAST.items():
            self._check_at_least(name, least)
        for name in _AT_LEAST_OR_NONE:
            if getattr(self, name) is not None:
                self._check_at_least(name, 1)
        if self.width % self.heads:
            raise ValueError(f"UMDAConfig.heads: expected a divisor of width = {self.width}, got {self.heads}")
        if self.hcva != "auto" and not isinstance(self.hcva, bool):
            raise TypeError(f"UMDAConfig.hcva: expected a bool or 'auto', got {self.hcva!r}")
        if self.has_hcva and not MIN_HEAD_DIM <= self.width // self.heads <= MAX_HEAD_DIM:
            raise ValueError(
                f"UMDAConfig.heads: expected width / heads in {MIN_HEAD_DIM}..{MAX_HEAD_DIM}, "
                f"got {self.width} / {self.heads} = {self.width // self.heads}"
            )
        if self.has_hcva and len(self.views) > MAX_VIEWS:
            raise ValueError(f"UMDAConfig.views: expected at most {MAX_VIEWS}, got {len(self.views)}")
        if self.layer_scale is not None:
            object.__setattr__(self, "layer_scale", as_float("UMDAConfig.layer_scale", self.layer_scale))
        for name in ("dropout", "input_dropout", "graph_tau", "kappa", "kappa_g", "delta", "gamma"):
            object.__setattr__(self, name, as_float(f"UMDAConfig.{name}", getattr(self, name)))
        for name in ("dropout", "input_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"UMDAConfig.{name}: expected at least 0 and below 1, got {getattr(self, name)}")
        if self.graph_tau <= 0.0:
            raise ValueError(f"UMDAConfig.graph_tau: expected a positive number, got {self.graph_tau}")
        for name in ("delta", "gamma"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"UMDAConfig.{name}: expected at least 0, got {getattr(self, name)}")
        for name, choices in (
            ("message", get_args(Message)),
            ("message_norm", get_args(MessageNorm)),
            ("branching", get_args(Branching)),
        ):
            if getattr(self, name) not in choices:
                expected, got = ", ".join(choices), getattr(self, name)
                raise ValueError(f"UMDAConfig.{name}: expected one of {expected}, got {got!r}")
        if self.message_ffn and self.message_norm != "pre":
            raise ValueError(f"UMDAConfig.message_ffn: expected 0 with message_norm=post, got {self.message_ffn}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"UMDAConfig.{name}: expected a bool, got {getattr(self, name)!r}")
        if self.hierarchy is not None:
            self._check_hierarchy()

    def _check_at_least(self, name: str, least: int) -> None:
        value = check_int(f"UMDAConfig.{name}", getattr(self, name))
        if value < least:
            raise ValueError(f"UMDAConfig.{name}: expected at least {least}, got {value}")

    def _check_hierarchy(self) -> None:
        where, count = "UMDAConfig.hierarchy", len(self.tasks)
        rows = tuple(
            tuple(as_float(where, value) for value in as_tuple(where, row))
            for row in as_tuple(where, self.hierarchy)
        )
        if len(rows) != count or any(len(row) != count for row in rows):
            shape = f"{len(rows)} rows of lengths {sorted({len(row) for row in rows})}"
            raise ValueError(f"{where}: expected {count} x {count} distances, one per pair of tasks, got {shape}")
        for s in range(count):
            for t in range(count):
                if rows[s][t] < 0 or rows[s][t] != rows[t][s] or (s == t and rows[s][t] != 0):
                    raise ValueError(
                        f"{where}: expected distances (symmetric, at least 0, 0 from a task to itself), got "
                        f"[{s}][{t}] = {rows[s][t]}, [{t}][{s}] = {rows[t][s]}"
                    )
        object.__setattr__(self, "hierarchy", rows)

    @property
    def has_hcva(self) -> bool:
        """Whether there is cross-view attention."""
        return len(self.views) > 1 if self.hcva == "auto" else bool(self.hcva)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the `version` of their meaning; `from_dict` reads them back."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UMDAConfig:
        """The configuration that `to_dict` wrote, before or after a trip through JSON.

        `to_dict` writes every option. One that is not there was none yet: what was then done need not be today's
        default.

        Raises:
            TypeError, ValueError: an unknown, missing or wrong field, by name, or a version still to come.
        """
        values = dict(values)
        version = check_int("UMDAConfig.version", values.pop("version", 1))
        if not 1 <= version <= VERSION:
            raise ValueError(f"UMDAConfig.version: expected 1..{VERSION}, got {version}: from a newer umda-fast")
        values = {**BEFORE_2, **values}
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"UMDAConfig: expected fields among {', '.join(known)}, got {unknown[0]!r}")
        missing = [name for name in ("views", "tasks") if name not in values]
        if missing:
            raise ValueError(f"UMDAConfig.{missing[0]}: expected a sequence, got none")
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> UMDAConfig:
        """The configuration that `to_json` wrote. Raises as `from_dict` does."""
        return cls.from_dict(json.loads(text))


def _specs(name: str, kind: type[Any], value: object) -> tuple[Any, ...]:
    specs = []
    for item in as_tuple(f"UMDAConfig.{name}", value):
        spec = kind(**item) if isinstance(item, Mapping) else item
        if not isinstance(spec, kind):
            raise TypeError(f"UMDAConfig.{name}: expected {kind.__name__}, got {type(spec).__name__}")
        specs.append(spec)
    return tuple(specs)
