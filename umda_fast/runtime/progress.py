"""Progress of long work: a bar with rate, ETA and peak memory on a terminal, a line every few seconds
elsewhere.
"""

from __future__ import annotations

import resource
import sys
import time
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

__all__ = ["ProgressReport", "peak_memory_mb"]


def peak_memory_mb(device: torch.device | None = None) -> float:
    """Peak memory in MiB: of the process, or what torch allocated on `device` if that is a GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class ProgressReport:
    """Context manager; `update` is called as often as one likes.

    Args:
        title: what is being done.
        device: whose peak memory is shown.
        start: share of the work done before (a resumed run).
        enabled: False shows nothing.
        every: seconds between two lines where there is no terminal.
        console: standard error by default, so that standard output stays for results.
    """

    def __init__(
        self,
        title: str,
        *,
        device: torch.device | None = None,
        start: float = 0.0,
        enabled: bool = True,
        every: float = 5.0,
        console: Console | None = None,
    ) -> None:
        self.title = title
        self.device = device
        self.every = every
        self.enabled = enabled
        self.console = console or Console(stderr=True)
        self._start_share = start
        self._begin = self._last = time.monotonic()
        self._instances = 0
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressReport:
        self._begin = self._last = time.monotonic()
        if self.enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(self.title, total=1.0, status="")
            self._bar.update(self._task, completed=self._start_share)
            self._bar.start()
        return self

    def update(self, share: float, *, instances: int = 0, note: str = "") -> None:
        """`share` in [0, 1] of all the work is done; `instances` more since the last call."""
        self._instances += instances
        if not self.enabled:
            return
        now = time.monotonic()
        if self._bar is None and now - self._last < self.every:
            return
        elapsed = max(now - self._begin, 1e-9)
        done = share - self._start_share
        eta = _duration(elapsed * (1.0 - share) / done) if done > 0 else "?"
        rate = self._instances / elapsed
        status = f"{rate:,.0f} instances/s, ETA {eta}, peak {peak_memory_mb(self.device):,.0f} MiB"
        status = f"{status}, {note}" if note else status
        if self._bar is not None:
            self._bar.update(self._task, completed=share, status=status)
        else:
            self._last = now
            self.console.print(f"{self.title}: {share:.0%}, {status}", highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
