"""Where sections run: here, or each in a process of its own, so that one that crashes takes nothing else with it."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from .measure import explain
from .sections import GRACE, SECTIONS, Record, Task


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
    """Every section in a process of its own, ``jobs`` at a time."""

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, list[Record], str | None]]:
        """As `Here`; one that crashes beside others is run once more, alone."""
        with ThreadPoolExecutor(self.jobs) as pool:
            found = list(pool.map(self._run, tasks))
        for task, (records, problem) in zip(tasks, found, strict=True):
            if problem is not None and self.jobs > 1:
                records, problem = self._run(task)
            yield task, records, problem

    def _run(self, task: Task) -> tuple[list[Record], str | None]:
        with tempfile.TemporaryDirectory() as folder:
            order, answer, errors = (Path(folder) / name for name in ("task.json", "records.jsonl", "errors.txt"))
            order.write_text(json.dumps(asdict(task)))
            answer.touch()
            command = [sys.executable, "-m", f"{__package__}.gpu_suite", "--section", str(order), str(answer)]
            limit = task.seconds + GRACE  # the section watches the clock itself; this is for one that hangs
            with errors.open("w") as stream:
                try:
                    code = subprocess.run(command, stderr=stream, stdout=stream, timeout=limit).returncode
                    problem = None if code == 0 else f"crashed: exit code {code}: {_last_line(errors)}"
                except subprocess.TimeoutExpired:
                    problem = f"crashed: did not end within {limit:.0f} s"
            records = []
            for text in answer.read_text().splitlines():
                try:
                    records.append(json.loads(text))
                except json.JSONDecodeError:  # killed in mid-line
                    break
            return records, problem


def _last_line(path: Path) -> str:
    lines = [text.strip() for text in path.read_text(errors="replace").splitlines() if text.strip()]
    return lines[-1][:300] if lines else "no message"


def run_section(order: str, answer: str) -> None:
    """The other end of `Processes`."""
    with open(answer, "a") as stream:

        def emit(record: Record) -> None:
            stream.write(json.dumps(record) + "\n")
            stream.flush()

        task = Task(**json.loads(Path(order).read_text()))
        SECTIONS[task.section](task, emit)
