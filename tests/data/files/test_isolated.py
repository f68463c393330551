"""Calls in another process: results, errors, and what becomes of a call that never ends or ends the process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.slide_files import grid, write_clam, write_labels, write_stamp
from umda_fast.data import inspect_source, load_source, pack_slides
from umda_fast.data.files import isolated as module
from umda_fast.data.files.isolated import FORKS, IsolatedCalls
from umda_fast.errors import DataError

FILE = Path("slides/a.h5")

pytestmark = pytest.mark.skipif(not FORKS, reason="calls are isolated on Linux only")


def spin() -> None:
    while True:
        pass


def burn(seconds: float) -> None:
    """So many seconds of processor time, the system's included, as the limit counts it."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_results_and_errors_come_back() -> None:
    with IsolatedCalls(5.0) as isolated:
        there = isolated(FILE, os.getpid)
        assert there != os.getpid()
        assert isolated(FILE, os.getpid) == there
        assert isolated(FILE, divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            isolated(FILE, divmod, 7, 0)
        assert isolated(FILE, torch.get_num_threads) == 1
        assert isolated(FILE, os.getpid) == there
        assert there in children()
    assert there not in children()


def test_a_call_without_end() -> None:
    with IsolatedCalls(0.2) as isolated:
        before = isolated(FILE, os.getpid)
        with pytest.raises(DataError, match=r"slides/a\.h5: corrupt, or too slow to read: not done after 0\.2 s"):
            isolated(FILE, spin)
        assert isolated(FILE, os.getpid) not in (before, os.getpid())


def test_waiting_is_not_held_against_a_call() -> None:
    with IsolatedCalls(0.2) as isolated:
        there = isolated(FILE, os.getpid)
        for _ in range(3):
            isolated(FILE, signal.sigtimedwait, [signal.SIGUSR1], 0.2)
        assert isolated(FILE, os.getpid) == there


def test_calls_do_not_add_up() -> None:
    with IsolatedCalls(1.0) as isolated:
        there = isolated(FILE, os.getpid)
        for _ in range(4):
            isolated(FILE, burn, 0.4)
        assert isolated(FILE, os.getpid) == there


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_call_that_crashes(number: signal.Signals) -> None:
    with IsolatedCalls(5.0) as isolated:
        before = isolated(FILE, os.getpid)
        with pytest.raises(DataError, match=rf"slides/a\.h5: corrupt, or too large .* ended by {number.name}"):
            isolated(FILE, signal.raise_signal, number)
        with pytest.raises(DataError, match=r"slides/a\.h5: corrupt: .* ended with exit code 3"):
            isolated(FILE, os._exit, 3)
        assert isolated(FILE, os.getpid) != before


def test_an_interrupt_loses_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a call that was interrupted is not that of the next."""
    with IsolatedCalls(5.0) as isolated:
        isolated(FILE, os.getpid)

        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(isolated._pipe, "recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            isolated(FILE, divmod, 7, 2)
        assert isolated(FILE, divmod, 9, 2) == (4, 1)


def test_elsewhere_calls_are_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORKS", False)
    with IsolatedCalls(5.0) as isolated:
        assert isolated(FILE, os.getpid) == os.getpid()


@pytest.fixture
def slides(tmp_path):
    """Eight slides of STAMP's, of which s3 has one byte that sends libhdf5 round and round."""
    root = tmp_path / "slides"
    for index in range(8):
        rng = np.random.default_rng(index)
        write_stamp(root, f"s{index}", rng.normal(size=(9, 4)), grid(rng, 9, 256))
    write_labels(root / "labels.csv", {"slide": [f"s{index}" for index in range(8)], "y": [0, 1] * 4})
    path = root / "s3.h5"
    content = bytearray(path.read_bytes())
    # The length of a string in the heap that holds them: 4 becomes 0.
    length = content.index(b"tile", content.index(b"GCOL")) - 8
    assert content[length] == 4
    content[length] = 0
    path.write_bytes(content)
    return root


def test_a_file_that_libhdf5_does_not_come_back_from(slides, tmp_path) -> None:
    with pytest.raises(DataError, match=r"s3\.h5: corrupt"):
        load_source(slides, read_timeout=1.0)
    for report in (
        load_source(slides, read_timeout=1.0, skip_bad=True),
        inspect_source(slides, read_timeout=1.0, skip_bad=True),
        pack_slides(slides, tmp_path / "packed", read_timeout=1.0, skip_bad=True),
    ):
        assert len(report.skipped) == 1
        assert str(slides / "s3.h5") in report.skipped[0]
    assert load_source(tmp_path / "packed").whole.names == [f"s{index}" for index in range(8) if index != 3]
    with pytest.raises(DataError, match="read_timeout: expected a positive number of seconds, got 0"):
        load_source(slides, read_timeout=0)


def test_flipped_bytes(tmp_path) -> None:
    """Whatever bytes a file of HDF5 holds, opening it ends with bags or with an error that names it."""
    rng = np.random.default_rng(0)
    features, places = rng.normal(size=(40, 2)).astype(np.float32), grid(rng, 40)
    refused = []
    for write in (write_clam, write_stamp):
        root = tmp_path / write.__name__
        path = write(root, "a", features, places)
        for other in root.rglob("*.pt"):
            other.unlink()
        whole = path.read_bytes()
        for _ in range(30):
            broken = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                broken[place] = rng.integers(256)
            path.write_bytes(broken)
            try:
                load_source(root, read_timeout=1.0)
            except DataError as error:
                refused.append(str(error))
    assert len(refused) > 3
    assert all("a.h5" in message for message in refused)
