"""The `umda-fast` command.

`main` imports the commands only when it runs and turns a user's mistake into one line; the commands
themselves import torch and everything that needs it only when they run, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

# Modules whose import adds their commands to `umda_fast.cli.app.app`, in the order of --help.
_COMMANDS = ("app", "compare", "explain", "report", "pack", "bench")

# The extra that brings a package, for the message when it is missing.
_EXTRAS = {
    "lightning_fabric": "train",
    "matplotlib": "train",
    "pydantic": "train",
    "rich": "train",
    "safetensors": "train",
    "scipy": "train",
    "sklearn": "train",
    "tensorboard": "train",
    "torchmetrics": "train",
    "typer": "train",
    "yaml": "train",
    "h5py": "io",
    "pandas": "io",
    "torch_geometric": "graph",
    "torchjd": "balancers",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 for bad usage or bad data, 1 for anything else."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        for module in _COMMANDS:
            import_module(f"umda_fast.cli.{module}")
        from umda_fast.cli.app import app

        # Wherever it stands on the line, `--debug` belongs to the whole command.
        app(
            args=["--debug"] * debug + [item for item in arguments if item != "--debug"],
            prog_name="umda-fast",
        )
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _stop("interrupted; a training run goes on with --resume", 1)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if debug or extra is None:
            raise
        _stop(f"this command needs {error.name}; install it with: pip install 'umda_fast[{extra}]'", 1)
    except Exception as error:
        code = _code(error)
        if debug or code is None:
            raise
        _stop(str(error), code)


def _code(error: Exception) -> int | None:
    """The exit code for an error that one line explains, None for any other."""
    from umda_fast.errors import BackendUnavailableError, DataError

    if isinstance(error, DataError | BackendUnavailableError):
        return 2
    if (
        type(error).__name__ == "NonFiniteError"
    ):  # by name: its module imports torch, which may be what failed
        return 1
    return None


def _stop(message: str, code: int) -> None:
    for line in message.splitlines() or [""]:
        print(f"umda-fast: {line}", file=sys.stderr)
    sys.exit(code)
