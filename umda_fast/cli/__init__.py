"""The `umda-fast` command.

`main` imports the commands only when it runs and turns a user's mistake into one line; the commands
themselves import torch and everything that needs it only when they run, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from umda_fast.extras import EXTRAS, MissingExtraError

__all__ = ["main"]

# Commands that several processes, started by torchrun, do together.
_TOGETHER = ("train", "evaluate", "crossval")

def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 for bad usage or bad data, 4 for an extra that is missing, 1 for
    anything else; `parity` has codes of its own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    _speak_once(arguments)
    try:
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
        package = (error.name or "").split(".")[0]
        if debug or package not in EXTRAS:
            raise
        known = isinstance(error, MissingExtraError)
        _stop(str(error if known else MissingExtraError("this command", package)), 4)
    except Exception as error:
        code = _code(error)
        if debug or code is None:
            raise
        _stop(str(error), code)


def _speak_once(arguments: Sequence[str]) -> None:
    """Several processes of torchrun: one of them prints results. Only some commands know of each other."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    command = next((item for item in arguments if not item.startswith("-")), None)
    if command is not None and command not in _TOGETHER:
        _stop(
            f"{command}: runs in one process, got {os.environ['WORLD_SIZE']} of torchrun; "
            f"several are for {', '.join(_TOGETHER)}",
            2,
        )
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process runs


def _code(error: Exception) -> int | None:
    """The exit code for an error that one line explains, None for any other."""
    from umda_fast.errors import BackendUnavailableError, DataError, ProcessLostError

    if isinstance(error, DataError | BackendUnavailableError):
        return 2
    if isinstance(error, ProcessLostError):
        return 1
    if (
        type(error).__name__ == "NonFiniteError"
    ):  # by name: its module imports torch, which may be what failed
        return 1
    return None


def _stop(message: str, code: int) -> None:
    for line in message.splitlines() or [""]:
        print(f"umda-fast: {line}", file=sys.stderr)
    sys.exit(code)
