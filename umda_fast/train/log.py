"""What a run says of itself while it trains: metrics.jsonl, and TensorBoard's events beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from umda_fast.runtime.rundir import MetricsLog, RunDirectory

__all__ = ["Events", "TrainingLog", "tensorboard_events"]


class Events(Protocol):
    """What of TensorBoard's SummaryWriter the log uses."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


class TrainingLog:
    """The log of a run, by one of its processes: the others have one that writes nothing.

    Args:
        run: its directory.
        writes: whether this process is the one.

    Attributes:
        events: a TensorBoard SummaryWriter, or None.
    """

    def __init__(self, run: RunDirectory, *, writes: bool) -> None:
        self.events: Events | None = None
        self._run = run
        self._writes = writes
        self._file: MetricsLog | None = None

    @property
    def begun(self) -> bool:
        """Whether there is a file to write to."""
        return self._file is not None

    def begin(self, offset: int = 0) -> None:
        """Open the file and go on behind its first `offset` bytes; the rest is cut off.

        Raises:
            DataError: the file is shorter.
        """
        if self._writes:
            self.close()
            self._file = MetricsLog(self._run.log, offset=offset)

    def write(self, record: Mapping[str, Any], step: int) -> None:
        """Append a record of `step`."""
        if self._file is None:
            return
        self._file.write(dict(record))
        if self.events is not None:
            for tag, value in _scalars(record):
                self.events.add_scalar(tag, value, step)

    def sync(self) -> int:
        """Bring everything written to the disk; returns the offset for a checkpoint."""
        return 0 if self._file is None else self._file.sync()

    def close(self) -> None:
        """Nothing more will be written."""
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def tensorboard_events(run: RunDirectory, step: int) -> Iterator[Any]:
    """TensorBoard's writer; what an earlier, killed process wrote from `step` on is no longer shown."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.events), purge_step=step or None)
    try:
        yield writer
    finally:
        writer.close()


def _scalars(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers in a nested record as (tag, value), for TensorBoard."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if not prefix and key in ("kind", "step", "epoch"):
            continue
        if isinstance(value, Mapping):
            found.extend(_scalars(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + key, float(value)))
    return found
