"""Where a result comes from: what every JSON that a command writes says beside its own content.

    schema     {name, version}: a file of `umda_fast/schemas` is the JSON schema of that name
    versions   of what the result depends on
    commit     {hash, clean} of the checkout that umda_fast runs from; both null for an installed package
    machine    system, processor, cores, threads, devices
    time       when it was written, UTC

A schema's version rises when a reader of the earlier one would misread a file; a field that is added is not that.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

import umda_fast

__all__ = ["SCHEMAS", "commit", "machine", "stamped", "versions"]

SCHEMAS: Mapping[str, int] = {
    "bench": 2,
    "compare": 1,
    "crossval": 1,
    "evaluate": 1,
    "info": 1,
    "inspect": 1,
    "metrics": 1,
    "parity": 1,
    "profile": 1,
    "search": 1,
    "shots": 1,
}
"""Schemas by name, with their versions; `umda_fast/schemas/<name>.json` each."""


def stamped(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with what every JSON says, before it; what it says itself (a machine in more words) stays.

    Args:
        name: of the schema, among `SCHEMAS`.
    """
    return {
        "schema": {"name": f"umda_fast.{name}", "version": SCHEMAS[name]},
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **content,
    }


def schema_file(name: str) -> Any:
    """The file of a schema, also of `stamp`, which all refer to."""
    return resources.files("umda_fast") / "schemas" / f"{name}.json"


def versions() -> dict[str, str]:
    """Versions of what a result depends on; a package that is not installed is not named."""
    found = {
        "python": platform.python_version(),
        "umda_fast": umda_fast.__version__,
        "torch": torch.__version__,
    }
    for package in ("numpy", "triton", "lightning-fabric", "torchmetrics", "torch_geometric", "torchjd", "optuna"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> dict[str, Any]:
    """The commit that was checked out, and whether anything differs from it.

    Only of a checkout of umda_fast itself: a package installed somewhere inside another repository has none.
    """
    root = Path(umda_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"hash": None, "clean": None}
    found = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"hash": found, "clean": None if changes is None else changes == ""}


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", os.fspath(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Processor and GPUs, without a name of the machine."""
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        devices.append({"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability})
    return {
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
