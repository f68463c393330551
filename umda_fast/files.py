"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed; and the folder of
what may be lost. Lowest floor: imports nothing of the package."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

__all__ = ["atomic_file", "cache_folder", "json_ready", "save_torch", "shared_mode", "write_json", "write_text"]


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success it takes the place of `path` in one step.

    A process killed at any moment leaves either the old file or the new one, never a part of one. If the body
    raises, the temporary file is removed and `path` keeps its old content.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield cast(BinaryIO, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, shared_mode())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_directory(target.parent)


def cache_folder() -> Path:
    """`umda_fast` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`): what can be made anew."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "umda_fast"


def shared_mode() -> int:
    """The permissions `open` gives a new file; mkstemp's 0600 locks colleagues out of a run directory."""
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    return 0o666 & ~mask


def _sync_directory(directory: Path) -> None:
    # Without this the rename itself may be lost when the machine, not only the process, goes down.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def json_ready(value: Any) -> Any:
    """`value` with everything JSON cannot hold turned into what it can: NaN and infinities become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, torch.Tensor):
        return json_ready(value.tolist())
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # a numpy scalar
        return json_ready(value.item())
    return str(value)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(json_ready(value), indent=2, allow_nan=False) + "\n")


def save_torch(
    path: str | os.PathLike[str], value: Any, *, save: Callable[[Any, BinaryIO], None] | None = None
) -> None:
    """`torch.save(value)` to `path`, whole or not at all."""
    with atomic_file(path) as stream:
        (save or torch.save)(value, stream)
