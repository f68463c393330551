"""The commands, gathered. Everything heavy is imported inside them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from umda_fast.cli.options import flat

__all__ = ["COMMANDS", "app", "gather"]

# In the order of --help. Each is a file here with a function of its name and an EXAMPLE of its use.
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "crossval",
    "inspect",
    "parity",
    "info",
    "compare",
    "search",
    "explain",
    "report",
    "adapt",
    "pack",
    "profile",
    "bench",
    "tune",
)


def gather(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """The command line of these commands."""
    whole = typer.Typer(
        name="umda-fast",
        help="Unified multitask, multiview deep learning on bags of instances.",
        epilog="Example: umda-fast train --data digits --out runs/first && umda-fast evaluate runs/first",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    whole.callback()(_whole)
    for name in commands:
        module = import_module(f"umda_fast.cli.{name}")
        whole.command(name, epilog=f"Example: {module.EXAMPLE}")(flat(getattr(module, name)))
    return whole


def _whole(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of any error.")] = False,
) -> None:
    pass


app = gather()
