import io

import pytest
from rich.console import Console

from umda_fast.runtime import progress as module
from umda_fast.runtime.progress import ProgressReport, peak_memory_mb


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_without_a_terminal_a_line_every_few_seconds(clock: Clock) -> None:
    out = io.StringIO()
    with ProgressReport("train", start=0.2, console=Console(file=out, width=200)) as report:
        for second in range(1, 13):
            clock.now += 1
            report.update(0.2 + second * 0.05, instances=1000, note="epoch 3/9")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    # After 10 s, 50 of the 80 % that were left are done, so 6 s remain; what was done before does not count.
    assert lines[1].startswith("train: 70%, 1,000 instances/s, ETA 0:06, peak ")
    assert lines[1].endswith("MiB, epoch 3/9")


def test_short_work_and_disabled_work_say_nothing(clock: Clock) -> None:
    out = io.StringIO()
    with ProgressReport("short", console=Console(file=out)) as report:
        report.update(1.0, instances=10)
    with ProgressReport("off", console=Console(file=out), enabled=False) as report:
        clock.now += 60
        report.update(0.5)
    assert out.getvalue() == ""


def test_on_a_terminal_a_bar_shows_rate_eta_and_memory(clock: Clock) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system=None)
    with ProgressReport("train", console=console) as report:
        clock.now += 4
        report.update(0.25, instances=800, note="epoch 1/4")
    assert "200 instances/s, ETA 0:12, peak " in out.getvalue()


def test_peak_memory_is_that_of_a_process_with_torch() -> None:
    assert 50 < peak_memory_mb() < 100_000
