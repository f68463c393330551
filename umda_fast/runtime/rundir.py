"""The run directory: where its files lie, and a metrics log that can be cut back to a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

from umda_fast.errors import DataError
from umda_fast.files import json_ready, shared_mode
from umda_fast.model.mixture import MIXTURE

__all__ = ["MetricsLog", "RunDirectory", "read_metrics", "save_model"]


class RunDirectory:
    """Paths of a run directory (spec: config.yaml, splits.csv, metrics.jsonl, metrics.json, model.safetensors,
    checkpoint.pt, plots/, TensorBoard events)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.splits = self.path / "splits.csv"
        self.log = self.path / "metrics.jsonl"
        self.metrics = self.path / "metrics.json"
        self.weights = self.path / "model.safetensors"
        self.checkpoint = self.path / "checkpoint.pt"
        self.calibration = self.path / "calibration.json"
        self.mixture = self.path / MIXTURE
        self.plots = self.path / "plots"
        self.events = self.path / "tensorboard"
        self.profile = self.path / "profile"

    def begin(self, *, resume: bool) -> None:
        """Create the directory, or make sure that it may be used.

        Raises:
            DataError: it holds a run and `resume` is false, holds none and `resume` is true, or is no
            directory.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path}: is a file; expected a run directory")
        if resume and not self.config.is_file():
            raise DataError(f"{self.path}: holds no run to resume (no {self.config.name})")
        if not resume and (self.config.exists() or self.checkpoint.exists()):
            raise DataError(
                f"{self.path}: already holds a run; continue it with --resume or choose another --out"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be created: {error.strerror or error}") from None

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """The run directory at `path`, which must hold a model; DataError otherwise."""
        run = cls(path)
        if not run.path.is_dir():
            raise DataError(f"{run.path}: no such run directory")
        for needed in (run.config, run.weights):
            if not needed.is_file():
                raise DataError(f"{run.path}: is not a finished run directory ({needed.name} is missing)")
        return run


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended.

    `offset` is the length in bytes of what is safely written; a checkpoint stores it, and a resumed run cuts
    the file back to it, so that no step is in the file twice.
    """

    def __init__(self, path: str | os.PathLike[str], *, offset: int = 0) -> None:
        self.path = Path(path)
        self._stream = open(self.path, "ab")  # noqa: SIM115 - held open for the length of the run
        if self._stream.tell() < offset:
            size = self._stream.tell()
            self._stream.close()
            raise DataError(
                f"{self.path}: has {size} bytes, the checkpoint knows of {offset}; was it edited?"
            )
        self._stream.truncate(offset)
        self._stream.seek(offset)

    def write(self, record: dict[str, Any]) -> None:
        self._stream.write(json.dumps(json_ready(record), allow_nan=False).encode("utf-8") + b"\n")

    def sync(self) -> int:
        """Bring everything written to the disk; returns the offset for a checkpoint."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class _Saves(Protocol):
    def save_pretrained(self, directory: str | os.PathLike[str]) -> None: ...


def save_model(model: _Saves, directory: Path) -> None:
    """`model.save_pretrained` into `directory`, every file whole or absent."""
    temporary = Path(tempfile.mkdtemp(prefix=".model.", dir=directory))
    try:
        model.save_pretrained(temporary)
        for file in sorted(temporary.iterdir()):
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
            file.chmod(shared_mode())  # some writers leave 0600
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
