"""The options that several commands have, each said once, and the groups of them that go together.

A command takes an option by its alias (`quiet: Quiet = False`) or a group by its class (`computing: Computing`); a
group stands in `--help` as its options, in the place where the command takes it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import typer

__all__ = [
    "Backend",
    "Bags",
    "By",
    "Computing",
    "Configuration",
    "Device",
    "Epochs",
    "Format",
    "JsonFile",
    "OwnData",
    "PatchSize",
    "Quiet",
    "RunDir",
    "RunDirs",
    "Set",
    "SkipBad",
    "Source",
    "TrainedOn",
    "flat",
    "out_option",
    "seed_option",
    "split_option",
]

Source = Annotated[
    str | None,
    typer.Option("--data", metavar="SOURCE", help="digits, a directory of bags beside a labels.csv, or an .npz file."),
]
OwnData = Annotated[
    str | None, typer.Option("--data", metavar="SOURCE", help="Which bags.  [default: the run's own data]")
]
Format = Annotated[
    str | None, typer.Option("--format", help="The kind of SOURCE, instead of recognising it from its content.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE.yaml", help="Any part of a configuration.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One value of the configuration; may be repeated."),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
Backend = Annotated[
    str | None, typer.Option("--backend", help="auto, reference, cpp, triton or cuda: who computes the operations.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training bags.")]
PatchSize = Annotated[
    float | None,
    typer.Option(
        "--patch-size",
        metavar="SIZE",
        help="Edge of a patch in the unit of the coordinates (level-0 pixels, micrometres).  "
        "[default: as the data says, else the commonest distance between patches]",
    ),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
RunDirs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="A run directory; of several, the mean of what they predict.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out what is bad in a directory of bags, and list it.")
]
By = Annotated[
    str,
    typer.Option(
        "--by", metavar="bag|patient", help="What a prediction is of: of a patient the mean over the bags."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


def seed_option(of: str) -> Any:
    """`--seed`, in the words of what it is the seed of."""
    return typer.Option("--seed", help=f"Seed of {of}.  [default: 0]")


def out_option(what: str, metavar: str = "DIR") -> Any:
    """`--out`, in the words of what goes there."""
    return typer.Option("--out", metavar=metavar, help=what)


def split_option(what: str) -> Any:
    """`--split`, in the words of what is done with that part of the data."""
    return typer.Option("--split", help=what)


@dataclass(frozen=True)
class Bags:
    """Where the bags come from."""

    data: Source = None
    format: Format = None


@dataclass(frozen=True)
class Configuration:
    """What a configuration is made of, beside the options that stand for one of its values."""

    config: ConfigFile = None
    set_: Set = None


@dataclass(frozen=True)
class Computing:
    """Where and by whom things are computed."""

    device: Device = None
    backend: Backend = None

    def given(self) -> dict[str, Any]:
        """Values of a configuration, None where nothing was given."""
        if self.backend == "auto":
            # Elsewhere `auto` leaves it to the environment; on this line it was asked for.
            from umda_fast.ops import set_backend

            set_backend("auto")
        return {"device": self.device, "backend": self.backend}

    def arguments(self) -> dict[str, Any]:
        """As the functions that use a trained model take them."""
        return {name: value or "auto" for name, value in self.given().items()}


@dataclass(frozen=True)
class TrainedOn(Computing):
    """How bags go through a trained model."""

    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="data.options.<name> of the source; may be repeated."),
    ] = None
    skip_bad: SkipBad = False
    quiet: Quiet = False

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "skip_bad": self.skip_bad, "progress": not self.quiet}


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, whose parameters are keywords, as typer takes it: a group is replaced by its options.

    Every option of a group has a default.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        group = hints[name]
        if not (inspect.isclass(group) and is_dataclass(group)):
            parameters.append(parameter.replace(annotation=group))
            continue
        own = get_type_hints(group, include_extras=True)
        for option in fields(group):
            assert option.default is not MISSING, f"{group}: {option.name} has no default"
            parameters.append(parameter.replace(name=option.name, annotation=own[option.name], default=option.default))
        groups[name] = group, [option.name for option in fields(group)]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, (group, options) in groups.items():
            values[name] = group(**{option: values.pop(option) for option in options})
        function(**values)

    cast(Any, command).__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
