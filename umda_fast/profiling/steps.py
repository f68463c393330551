"""Steps of a training, profiled as they happen: a `StepProfile` looks on and changes nothing of what they compute."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.profiler import ProfilerActivity

from umda_fast.blocks import BlockRecord, block, recording, span
from umda_fast.errors import DataError
from umda_fast.files import shared_mode, write_json
from umda_fast.profiling.table import STEP, copy_rate, step_table
from umda_fast.profiling.timing import times, wall_seconds
from umda_fast.profiling.traffic import Traffic
from umda_fast.runtime.provenance import stamped

__all__ = ["RESULT", "TRACE", "WARMUP", "StepProfile"]

TRACE = "trace.json.gz"
RESULT = "profile.json"
WARMUP = 3


class Batch(Protocol):
    """What is asked of a batch."""

    @property
    def num_instances(self) -> int: ...


BatchT = TypeVar("BatchT", bound=Batch)


@dataclass
class _Phase:
    """So many steps in a row that are looked at in one way."""

    name: str
    steps: int
    done: int = 0
    instances: int = 0


class StepProfile:
    """Looks at the steps for which `steps` hands out batches: some warm up, then as many as were asked for are timed,
    then as many are counted (calls and bytes, which would cost time). On CUDA as many follow in which every block and
    operation is an NVTX range, for a profiler of the system.

    Args:
        steps: that are timed; 0 for no profile.
        device: on which the steps are computed.
        folder: where the trace and the result go.

    Raises:
        DataError: `steps` is negative.
    """

    def __init__(self, steps: int, device: torch.device, folder: str | os.PathLike[str]) -> None:
        if steps < 0:
            raise DataError(f"profile: expected a number of steps of at least 0, got {steps}")
        names = ("timed", "counted", "marked") if device.type == "cuda" else ("timed", "counted")
        self.device = device
        self.folder = Path(folder)
        self._phases = [_Phase("warmup", WARMUP), *(_Phase(name, steps) for name in names)] if steps else []
        self._record = BlockRecord()
        self._traffic = Traffic(self._record)
        self._profiler: Any = None
        self._stopped: Any = None

    @property
    def phase(self) -> _Phase | None:
        """The phase of the next step; None when all is seen."""
        return next((phase for phase in self._phases if phase.done < phase.steps), None)

    @property
    def missing(self) -> int:
        """Steps that have still to come before there is a result."""
        return sum(phase.steps - phase.done for phase in self._phases)

    def check(self, steps: int) -> None:
        """Raise DataError if a training of so many steps is too short for the profile."""
        if steps < self.missing:
            parts = ", ".join(f"{phase.steps} {phase.name}" for phase in self._phases)
            raise DataError(f"profile: expected a training of at least {self.missing} updates ({parts}), got {steps}")

    def steps(self, batches: Iterable[BatchT]) -> Iterator[BatchT]:
        """`batches`; what is done between one and the next is a step, and to draw one belongs to it."""
        source = iter(batches)
        while self.phase is not None:
            phase, batch = self.phase, None
            try:
                with self._looking(phase.name):
                    with block("data"):
                        batch = next(source, None)
                    if batch is None:
                        return
                    with span(STEP, self._record) if phase.name != "warmup" else nullcontext():
                        yield batch
            finally:
                if batch is not None:
                    self._took(phase, batch.num_instances)
        yield from source

    @contextmanager
    def _looking(self, phase: str) -> Iterator[None]:
        with ExitStack() as stack:
            if phase != "warmup":
                stack.enter_context(recording(self._record))
            if phase == "timed" and self._profiler is None:
                self._profiler = self._started()
            if phase == "counted":
                # Not around the whole step: with a dispatch mode torch computes the eigenvalues that the log tells in
                # another way, with other last digits.
                self._record.inside = self._traffic
                stack.callback(setattr, self._record, "inside", None)
            if phase == "marked":
                stack.enter_context(torch.autograd.profiler.emit_nvtx())
            yield

    def _started(self) -> Any:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.device)
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
        return profiler

    def _took(self, phase: _Phase, instances: int) -> None:
        phase.done += 1
        phase.instances += instances
        if phase.name == "timed" and phase.done == phase.steps:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.close()

    def close(self) -> None:
        """Stop the profiler, as an error on the way may demand."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            self._stopped = profiler

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around all steps: whatever happens, nothing is looked at afterwards."""
        with closing(self):
            yield

    def result(self) -> dict[str, Any]:
        """The table of the step as the schema `profile` has it, without its stamp.

        Raises:
            DataError: fewer steps came than the profile needs.
        """
        if self.missing:
            done = sum(phase.done for phase in self._phases)
            raise DataError(f"profile: the training ended after {done} steps, {self.missing} too early for a table")
        phases = {phase.name: phase for phase in self._phases}
        timed, counted = phases["timed"], phases["counted"]
        events = self._stopped.events()
        names = {operation for _, operation in self._traffic.counts}
        table = step_table(
            self._traffic.counts,
            times(events, self._record, names),
            timed_steps=timed.steps,
            counted_steps=counted.steps,
            scale=timed.instances / counted.instances,
            seconds=wall_seconds(events),
            copy_rate=copy_rate(self.device),
            on_device=self.device.type == "cuda",
        )
        return {
            "device": self.device.type,
            "steps": {phase.name: phase.steps for phase in self._phases},
            "instances": {phase.name: phase.instances for phase in self._phases},
            **table,
        }

    def save(self) -> dict[str, Any]:
        """Write the Chrome trace and the result; returns the result. Raises as `result` does."""
        result = self.result()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / RESULT, stamped("profile", result))
        handle, name = tempfile.mkstemp(prefix=f".{TRACE}.", suffix=".json.gz", dir=self.folder)
        os.close(handle)
        self._stopped.export_chrome_trace(name)
        os.chmod(name, shared_mode())
        os.replace(name, self.folder / TRACE)
        return result
