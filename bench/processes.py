"""Where sections run: here, or each in a process of its own, so that one that crashes takes nothing else with it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from umda_fast.heap import settle_heap

from .measure import explain
from .sections import GRACE, SECTIONS, Record, Task

#: Runs a section of the suite.
PROGRAM = (sys.executable, "-m", f"{__package__}.gpu_suite", "--section")
#: Seconds to wait for a process that was ended.
PATIENCE = 5.0


class Here:
    """Sections run in this process."""

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, list[Record], str | None]]:
        """Each task with its records and, where it broke off, why."""
        for task in tasks:
            records: list[Record] = []
            problem = None
            try:
                SECTIONS[task.section](task, records.append)
            except Exception as error:
                problem = ": ".join(explain(error))
            yield task, records, problem


class Processes:
    """Every section in a process of its own, ``jobs`` at a time.

    Args:
        jobs: processes at a time.
        folder: where each leaves its records as they come, so that they outlive whoever started it; None: nowhere.
        program: command that runs a section; it gets the files of its task and of its records.
    """

    def __init__(self, jobs: int = 1, folder: Path | None = None, program: Sequence[str] = PROGRAM) -> None:
        self.jobs = jobs
        self.folder = folder
        self.program = program

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, list[Record], str | None]]:
        """As `Here`, in the order in which they end; one that crashes beside others is run once more, alone. One that
        does not end has had its time."""
        again = []
        with ThreadPoolExecutor(self.jobs) as pool:
            running = {pool.submit(self._run, task): task for task in tasks}
            for ended in as_completed(running):
                records, problem, hung = ended.result()
                if problem is not None and not hung and self.jobs > 1:
                    again.append(running[ended])
                else:
                    yield running[ended], records, problem
        for task in again:
            records, problem, _ = self._run(task)
            yield task, records, problem

    def _run(self, task: Task) -> tuple[list[Record], str | None, bool]:
        """Records, what went wrong, and whether that was the time."""
        with tempfile.TemporaryDirectory() as own:
            order, errors = Path(own) / "task.json", Path(own) / "errors.txt"
            answer = self._answer(task, Path(own))
            order.write_text(json.dumps(asdict(task)))
            answer.write_text("")
            limit = task.seconds + GRACE  # the section watches the clock itself; this is for one that hangs
            with errors.open("w") as stream:
                command = [*self.program, str(order), str(answer)]
                process = subprocess.Popen(command, stderr=stream, stdout=stream, start_new_session=True)
                try:
                    code, hung = process.wait(limit), False
                    problem = None if code == 0 else f"crashed: exit code {code}: {_last_line(errors)}"
                except subprocess.TimeoutExpired:
                    problem, hung = f"crashed: did not end within {limit:.0f} s", True
                    _end(process)
            records = []
            for text in answer.read_text().splitlines():
                try:
                    records.append(json.loads(text))
                except json.JSONDecodeError:  # killed in mid-line
                    break
            return records, problem, hung

    def _answer(self, task: Task, own: Path) -> Path:
        if self.folder is None:
            return own / "records.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        name = " ".join([task.section, *task.ops[:1], *task.dtypes])
        return self.folder / f"{name}.jsonl"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that it started, and does not wait for one that a driver holds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)


def _last_line(path: Path) -> str:
    lines = [text.strip() for text in path.read_text(errors="replace").splitlines() if text.strip()]
    return lines[-1][:300] if lines else "no message"


def run_section(order: str, answer: str) -> None:
    """The other end of `Processes`."""
    settle_heap()
    with open(answer, "a") as stream:

        def emit(record: Record) -> None:
            stream.write(json.dumps(record) + "\n")
            stream.flush()

        task = Task(**json.loads(Path(order).read_text()))
        SECTIONS[task.section](task, emit)
