"""The configuration of a run: plain dataclasses, checked by pydantic, from YAML and from `--set key=value`.

Every value has a default, so an empty file is a whole configuration. Whatever is wrong is reported by its
dotted key, with what came, what was expected, and the nearest known key where one is near.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from umda_fast.errors import DataError
from umda_fast.files import write_text
from umda_fast.model import UMDAConfig
from umda_fast.model.baselines import BASELINES
from umda_fast.model.config import BEFORE_2
from umda_fast.sgl import BALANCERS, Balancer, Scope

__all__ = [
    "ConfigError",
    "DataConfig",
    "PenaltyConfig",
    "RunConfig",
    "SGLConfig",
    "TrainConfig",
    "complete_run_config",
    "dump_config",
    "load_config",
    "load_run_config",
    "make_balancer",
    "make_config",
    "override_values",
]

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["32-true", "bf16-mixed"]
Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _off(value: object) -> object:
    """YAML reads the bare word `off` as false."""
    return "off" if value is False else value


class ConfigError(DataError):
    """A configuration that cannot be used; each line names a key, what came and what was expected."""


class _Section:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", validate_default=True)


@dataclass(frozen=True)
class DataConfig(_Section):
    """Where the bags come from and how they are put into batches."""

    source: str = "digits"
    """`digits`, a directory of bags beside a labels.csv, an .npz file, ..."""
    format: str | None = None
    """Overrides the kind recognised from the content."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the splits and of generated bags; None takes the run's."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the source, for example `train_bags` of `digits`."""
    bags: Positive | Literal["auto"] | None = "auto"
    """Bags in a batch of the training: `auto` chooses 16 to 64 from their number (docs/training.md), None sets no
    limit."""
    budget: Positive = 4096
    """Instances in a batch at most, for memory; a batch holds whole bags."""
    standardize: bool | list[str] | Literal["auto"] = "auto"
    """Give every feature mean 0 and standard deviation 1 over the training instances, inside the model; a list of views
    does so for these only. `auto` looks at the features first: counts, most of them zero, are only divided by one
    number."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read bags ahead."""
    instance_dropout: Decay = 0.0
    """Share of every training bag's instances that an epoch leaves out, others in each epoch."""
    paths: dict[str, list[str]] = field(default_factory=dict)
    """Where files and directories named above were when the run began: absolute, and from the run directory. A run
    fills it in."""


@dataclass(frozen=True)
class SGLConfig(_Section):
    """Self-guided learning; `balancer: none` trains on the plain sum of the losses, without statistics."""

    balancer: str = "sgl"
    """A name in `umda_fast.sgl.BALANCERS`, or none."""
    scope: Scope = "representation"
    every: Positive = 1
    """Steps between two gradient statistics."""
    beta: Decay = 0.9
    """Decay of the running means of gradients, Gram matrix and cosines."""
    direction: Literal["average", "gradient"] = "gradient"
    """What the scope shared_parameters adds up: this step's gradients, which Adam smooths, or running means, which
    replace Adam's (see docs/results/sgl.md for both)."""
    weight_beta: Decay | None = None
    """Decay of the running mean of the weights; None leaves it to the balancer."""
    statistics: bool | None = None
    """Take task gradients even where the balancer does not need them; None leaves it to the balancer."""
    variance_window: Annotated[int, Field(ge=0)] = 100
    """Updates in a window of the gradient variance; 0 leaves it out."""
    control: bool = False
    """Also report the gradient variance of equal weights on the same gradients (scope shared_parameters)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the balancer, for example `alpha` of `sgl`."""


@dataclass(frozen=True)
class PenaltyConfig(_Section):
    """Weights (lambdas) of the penalties in the total loss."""

    entropy: NonNegative = 0.01
    consistency: NonNegative = 0.01
    dispersion: NonNegative = 0.01
    smoothness: NonNegative = 0.01
    diversity: NonNegative = 0.01
    divergence: NonNegative = 0.01
    cohesion: NonNegative = 0.01
    linear: NonNegative = 0.001
    """The ridge of the linear path (`model.linear_path`)."""


@dataclass(frozen=True)
class TrainConfig(_Section):
    """The optimiser, the schedule, and when to stop, log and save."""

    epochs: Positive | None = None
    """Passes over the training bags; None leaves the length to `steps`, or, if that is None too, to the number of bags
    (docs/training.md)."""
    steps: Positive | None = None
    """Updates; where `epochs` are said as well, the training ends with whichever is reached first."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-3
    final_lr: Share = 0.01
    """Learning rate at the end of the cosine, as a share of `lr`."""
    warmup: Share = 0.05
    """Share of the training over which the learning rate rises linearly from 0."""
    weight_decay: NonNegative = 0.05
    """AdamW's; not applied to biases, norms and embeddings."""
    clip: NonNegative = 1.0
    """Largest norm of the gradient; 0 clips nothing."""
    view_loss: NonNegative = 1.0
    """With `model.view_heads`: weight of the losses of what every view alone says, at the start; it falls linearly to 0
    at the end."""
    select: str = "skill"
    """What decides which epoch's weights are kept, and `patience`, on the validation split: the mean `skill` of the
    tasks (docs/training.md), `mean_score`, `loss` (sum over tasks), the metric of a task as `<task>/<metric>`, or
    `last`, which keeps the last weights whatever they score."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many epochs that were not better, by `select`, on the validation split; 0 never stops early."""
    ema: Decay | Literal["auto"] = "auto"
    """Decay of a running mean of the weights, which is then what is evaluated and saved; `auto`: the smaller of .98 and
    (1 + t) / (10 + t) after t updates; 0 keeps none."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 200
    """Steps between two checkpoints inside an epoch; one is written at the end of every epoch in any case."""
    log_steps: Positive = 20
    """Steps between two lines of kind `step` in metrics.jsonl."""
    linear: Annotated[Literal["off", "beside", "mix"], BeforeValidator(_off)] = "mix"
    """A linear model of bag means at the end of the training (docs/training.md): compared on the validation split;
    `mix` weighs the two there task by task, and what is measured and kept is the mixture."""
    thresholds: Literal["auto", "share", "f1", "half"] = "auto"
    """Probability from which a label of a multilabel task is predicted, kept with the model: one half; or each
    label's own, by which as large a share of the validation bags gets it as has it among the training bags; or the one
    that is best for F1 on the validation split. `auto` takes the better one of the first two there."""
    deterministic: bool | None = None
    """Bit-identical repetition; None means yes on the CPU, no on a GPU."""
    keep: Literal["all", "scores"] = "all"
    """What a run leaves: `scores` writes config.yaml, splits.csv, metrics.jsonl and metrics.json only, no weights and
    no checkpoint (a stopped run begins anew): for many small runs, as in a cross-validation."""


@dataclass(frozen=True)
class RunConfig(_Section):
    """Everything a run depends on; `config.yaml` of a run directory is this, with every value."""

    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"
    precision: Precision = "32-true"
    backend: Backend = "auto"
    """Who computes the operations; `auto` leaves it to `UMDA_FAST_BACKEND`, and else to what the device has."""
    strict_backend: bool = False
    """Whether a backend that is named also refuses the layers that it leaves to PyTorch's library calls."""
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """`architecture` (umda, or a name in `umda_fast.model.baselines.BASELINES`) and its options: the fields of the
    configuration class of that name.
    """
    sgl: SGLConfig = field(default_factory=SGLConfig)
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


ARCHITECTURES: dict[str, type] = {
    "umda": UMDAConfig,
    **{name: model.config_class for name, model in BASELINES.items()},
}
# The config.yaml of a run has every key there was when it was written. What the run did where a key is absent, of those
# whose default is something else; and of those of the model `umda`, whatever is their default.
BEFORE: dict[str, Any] = {
    "data": {"bags": None},
    "train": {"select": "mean_score", "view_loss": 0.0, "linear": "beside", "thresholds": "half"},
}
BEFORE_UMDA: dict[str, Any] = {"model": BEFORE_2}
_FROM_DATA = ("views", "tasks", "metadata")  # fields of a model's configuration that the data decides


def _model_adapter(architecture: str) -> TypeAdapter[Any]:
    config = ARCHITECTURES[architecture]
    hints = get_type_hints(config, include_extras=True)
    fields: list[Any] = [("architecture", Literal[tuple(ARCHITECTURES)], field(default=architecture))]
    for item in dataclasses.fields(config):
        if item.name in _FROM_DATA or not item.init:
            continue
        if item.default_factory is not dataclasses.MISSING:
            default: Any = field(default_factory=item.default_factory)
        else:
            default = field(default=item.default)
        fields.append((item.name, hints[item.name], default))
    options = dataclasses.make_dataclass("ModelOptions", fields, bases=(_Section,), frozen=True)
    return TypeAdapter(options)


def _keys(config: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    hints = get_type_hints(config)
    for item in dataclasses.fields(config):
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            keys.extend(_keys(hints[item.name], f"{prefix}{item.name}."))
    return keys


def known_keys(architecture: str = "umda") -> list[str]:
    """Every dotted key of a configuration with a model of `architecture`."""
    names = [f.name for f in dataclasses.fields(ARCHITECTURES[architecture]) if f.name not in _FROM_DATA]
    return [*_keys(RunConfig), "model.architecture", *(f"model.{name}" for name in names)]


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not close:  # the right name in the wrong section
        leaf = key.rsplit(".", 1)[-1]
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        close = [leaves[name] for name in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _describe(error: ValidationError, prefix: str, known: Sequence[str]) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        key = prefix + ".".join(str(part) for part in item["loc"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{key}: unknown key{_nearest(key, known)}")
            continue
        message = item["msg"]
        message = message[0].lower() + message[1:]
        came = item["input"]
        lines.append(f"{key}: {message}, got {came!r} ({type(came).__name__})")
    return lines


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def make_balancer(config: SGLConfig) -> Balancer | None:
    """The configured balancer, None for `none`.

    Raises:
        ConfigError: an unknown name or option, or an option out of its range.
    """
    if config.balancer == "none":
        return None
    if config.balancer not in BALANCERS:
        near = _nearest(config.balancer, list(BALANCERS))
        known = ", ".join(BALANCERS)
        raise ConfigError(f"sgl.balancer: expected one of none, {known}, got {config.balancer!r}{near}")
    kind = BALANCERS[config.balancer]
    try:
        return kind(**config.options)
    except (TypeError, ValueError) as error:
        understood = ", ".join(inspect.signature(kind).parameters) or "none"
        raise ConfigError(f"sgl.options: {error} (options of {config.balancer}: {understood})") from None


def make_config(values: Mapping[str, Any] | None = None) -> RunConfig:
    """A checked `RunConfig` from nested plain values; whatever is absent takes its default.

    Raises:
        ConfigError: one line per problem, naming its dotted key, what came and what was expected.
    """
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(
            f"configuration: expected sections with keys, got {values!r} ({type(values).__name__})"
        )
    values = dict(values or {})
    model = values.get("model") or {}
    architecture = model.get("architecture", "umda") if isinstance(model, Mapping) else "umda"
    if architecture not in ARCHITECTURES:
        near = _nearest(str(architecture), list(ARCHITECTURES))
        expected = ", ".join(ARCHITECTURES)
        raise ConfigError(f"model.architecture: expected one of {expected}, got {architecture!r}{near}")
    known = known_keys(architecture)
    problems: list[str] = []
    # A section left empty in YAML is None; it means the defaults.
    sections = {"data", "model", "sgl", "penalties", "train"}
    cleaned = {key: ({} if key in sections and item is None else item) for key, item in values.items()}
    options: dict[str, Any] = {}
    if isinstance(model, Mapping):
        try:
            options = _plain(_model_adapter(architecture).validate_python(dict(model)))
        except ValidationError as error:
            problems.extend(_describe(error, "model.", known))
        except (TypeError, ValueError) as error:
            problems.append(f"model: {error}")
    config: RunConfig | None = None
    try:
        config = TypeAdapter(RunConfig).validate_python(cleaned)
    except ValidationError as error:
        problems.extend(_describe(error, "", known))
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    make_balancer(config.sgl)
    return dataclasses.replace(config, model=options)


def _apply_override(values: dict[str, Any], override: str, known: Sequence[str]) -> None:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, for example model.layers=3")
    try:
        value = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {_first_line(error)}") from None
    parts = key.split(".")
    here = values
    for index, part in enumerate(parts[:-1]):
        below = here.setdefault(part, {})
        if below is None:
            below = here[part] = {}
        if not isinstance(below, dict):
            where = ".".join(parts[: index + 1])
            raise ConfigError(f"--set {override}: {where} is a value, not a section{_nearest(key, known)}")
        here = below
    here[parts[-1]] = value


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """What `--set`-style overrides say, as nested plain values; only their form is checked. Raises ConfigError."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply_override(values, override, known_keys())
    return values


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _mutable(value: Any) -> Any:
    return {key: _mutable(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
    *,
    recorded: bool = False,
) -> RunConfig:
    """The configuration in the YAML file at `path` (None: all defaults), then `values`, then `--set`-style
    `overrides`.

    Args:
        path: a YAML file with any part of a `RunConfig`.
        overrides: strings `dotted.key=value`, the value read as YAML.
        values: nested plain values laid over the file's.
        recorded: whether a run wrote the file: keys that it lacks came later, see `complete_run_config`.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or value is wrong.
    """
    loaded: Any = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a YAML file: {_first_line(error)}") from None
        if loaded is None:
            loaded = {}
        if not isinstance(loaded, Mapping):
            raise ConfigError(f"{path}: expected sections with keys, got {type(loaded).__name__}")
    merged: dict[str, Any] = _recorded(loaded) if recorded else _mutable(loaded)
    _merge(merged, values or {})
    known = known_keys()
    for override in overrides:
        _apply_override(merged, override, known)
    try:
        return make_config(merged)
    except ConfigError as error:
        if path is None:
            raise
        raise ConfigError(f"{path}: {error}") from None


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        below = into.get(key)
        if isinstance(value, Mapping) and isinstance(below, dict):
            _merge(below, value)
        else:
            into[key] = _mutable(value)


def load_run_config(path: str | os.PathLike[str], values: Mapping[str, Any] | None = None) -> RunConfig:
    """As `load_config` of the config.yaml of a run, whatever version wrote it: a run trains on as it began.

    Raises:
        ConfigError: as `load_config`.
    """
    return load_config(path, values=values, recorded=True)


def _recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` laid over what a run did that lacks some keys."""
    merged: dict[str, Any] = _mutable(BEFORE)
    model = values.get("model") or {}
    if isinstance(model, Mapping) and model.get("architecture", "umda") == "umda":
        _merge(merged, BEFORE_UMDA)
    _merge(merged, values)
    return merged


def complete_run_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run's configuration and those of the keys that came to be after it was written.

    Raises:
        ConfigError: a key is no more.
    """
    return as_dict(make_config(_recorded(values)))


def as_dict(config: RunConfig) -> dict[str, Any]:
    """`config` as nested plain values, every key present."""
    plain: dict[str, Any] = _plain(config)
    return plain


def dump_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write `config` as YAML with every value, defaults included."""
    write_text(path, yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True))
