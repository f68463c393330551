"""``pytest bench``: options, and what every benchmark is given. The benchmarks are in `test_speed.py`."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pytest
import torch

from umda_fast.runtime.provenance import versions

from .brief import OVER
from .machine import machine
from .session import Session

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Beside those of pytest-benchmark."""
    group = parser.getgroup("umda_fast")
    group.addoption("--device", choices=["cpu", "cuda"], help="what is timed; default: cuda where torch finds it")
    group.addoption("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    group.addoption("--threads", type=int, metavar="N", help="of operations on the CPU; default: torch's own")


def pytest_configure(config: pytest.Config) -> None:
    """Threads; what cannot be is said before anything runs."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest bench: pytest-benchmark is not there; the extra dev brings it")
    threads = config.getoption("threads")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")


def device_of(config: pytest.Config) -> torch.device:
    """That of ``--device``."""
    return torch.device(config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What pytest-benchmark warns about where two runs that it compares differ."""
    machine_info["umda_fast"] = {**machine(device_of(config)), "versions": versions()}


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """Device, rates, data."""
    config = request.config
    made = Session(
        device_of(config),
        config.getoption("quick"),
        config.getoption("benchmark_min_rounds"),
        float(config.getoption("benchmark_max_time")),
    )
    config.stash[_SESSION] = made
    yield made
    made.release()


@pytest.fixture(scope="session")
def parity(session: Session) -> Callable[[str], None]:
    """Called with an operation before it is timed: held to the float64 reference once, it fails the benchmark of one
    that is wrong."""

    def require(op: str) -> None:
        reason = session.wrong(op)
        if reason is not None:
            pytest.fail(reason, pytrace=False)

    return require


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Shares of the floor, which pytest-benchmark's own table has no column for."""
    session = config.stash.get(_SESSION, None)
    if session is None or not session.shares or config.getoption("benchmark_quiet"):
        return
    terminalreporter.section("share of the floor")
    for title, entries in groupby(session.shares, key=lambda entry: entry[0]):
        terminalreporter.write_line(f"{title}: " + ", ".join(f"{name} {share:.1%}" for _, name, share in entries))
    if any(share > 1 for _, _, share in session.shares):
        terminalreporter.write_line(OVER)
