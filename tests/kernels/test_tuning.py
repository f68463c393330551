"""Configurations: every one that may be measured is right, the fastest is kept, nothing happens unasked."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.errors import TritonError

from tests.kernels import test_cross_view, test_cross_view_tokens
from tests.kernels._parity import normal
from umda_fast.errors import DataError
from umda_fast.kernels import _tuning, cross_view, cross_view_tokens, knn, tune
from umda_fast.kernels._tuning import Config, trying
from umda_fast.reference.knn import knn as knn_reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tuning file of the test's own, unread."""
    file = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv("UMDA_FAST_TUNING", str(file))
    _tuning._measured.cache_clear()
    _tuning._table.cache_clear()
    return file


def tiles(configs: list[Config]) -> list[Config]:
    """One configuration per tile: warps are nothing to the interpreter."""
    return list({tuple(config.tile.items()): config for config in configs}.values())


@pytest.mark.parametrize("views", [3, 5])
def test_candidates_of_cross_view(views: int) -> None:
    case = test_cross_view.make(3, views, 3, 16)
    for config in tiles(cross_view.candidates(torch.float32, views, 16, 3)):
        with (
            trying(cross_view.key(torch.float32, views, 16, 3, False), config),
            trying(cross_view.key(torch.float32, views, 16, 3, True), config),
        ):
            test_cross_view.check(case)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_candidates_of_cross_view_tokens() -> None:
    """Every kernel with another tile than its neighbours."""
    layout = test_cross_view_tokens.Layout([[(0, 35), (1, 2)]], views=2)
    case = test_cross_view_tokens.make(layout, 1, 16, torch.float16, gradients="omt")
    kernels = ("forward", "queries", "keys")
    keys = [cross_view_tokens.key(kernel, torch.float16, 16, 37, 2) for kernel in kernels]
    options = [tiles(cross_view_tokens.candidates(kernel, torch.float16, 16)) for kernel in kernels]
    for place in range(0, len(options[0]), 4):
        with (
            trying(keys[0], options[0][place]),
            trying(keys[1], options[1][place - 1]),
            trying(keys[2], options[2][place - 2]),
        ):
            test_cross_view_tokens.check(case)


def test_candidates_of_knn() -> None:
    x, ptr = normal(70, 16, seed=0).sign(), torch.tensor([0, 3, 70])
    expected = knn_reference(x, ptr, 5, "cosine")
    for config in tiles(knn.candidates(torch.float32, 16)):
        with trying(knn.key(torch.float32, 16, 5, "cosine"), config):
            assert all(torch.equal(a, b) for a, b in zip(knn.knn(x, ptr, 5, "cosine"), expected, strict=True))


def test_the_fastest_is_kept(own_file: Path) -> None:
    """And used from then on, here and in another process; what does not run is passed over."""
    key = cross_view.key(torch.float32, 2, 8, 1, False)
    case = test_cross_view.make(3, 2, 1, 8, masked=False)
    options = tiles(cross_view.candidates(torch.float32, 2, 8, 1))
    pinned = cross_view._config(case.q, False)
    options.sort(key=lambda config: config.tile == pinned.tile)
    wanted = options[1]

    def measure(run: Callable[[], None]) -> float:
        place = options.index(_tuning._trying[key])
        if place == 0:
            raise TritonError("too large")
        run()
        return float(place)

    def plan() -> list[tune.Launch]:
        return cross_view.plan_forward(case.q, case.k, case.v, case.gate, case.bias, None)[0]

    tune.tune(key, options, plan, CPU, measure)
    assert cross_view._config(case.q, False) == wanted
    assert plan()[0].constexprs["BN"] == wanted.tile["BN"]
    test_cross_view.check(case)
    [(machine, table)] = json.loads(own_file.read_text()).items()
    assert machine.startswith("cpu, triton ")
    assert list(table) == [key]
    with pytest.raises(RuntimeError, match="no configuration"):
        tune.tune(key, [], plan, CPU, measure)


def test_every_kernel_can_be_tuned(own_file: Path) -> None:
    def measure(run: Callable[[], None]) -> float:
        return float(len(repr(run)))

    told: list[str] = []
    tunables = [
        *tune.cross_view(torch.float32, 3, 1, 8, n=2, device=CPU),
        *tune.cross_view_tokens(torch.float16, 2, 1, 8, length=2, instances=1, device=CPU),
        *tune.knn(torch.float32, 4, 2, "cosine", n=5, device=CPU),
    ]
    tune.tune_all(tunables, CPU, measure, told.append)
    [table] = json.loads(own_file.read_text()).values()
    assert len(table) == len(told) == 2 + 3 + 1
    # What was measured is listed beside what is pinned.
    for row, line in zip(tune.listing(tunables), told, strict=True):
        [found] = row.measured.values()
        assert tune.describe(found) in line
        assert table[row.key]["tile"] == found.tile


def test_every_configuration_is_listed_without_a_gpu(own_file: Path) -> None:
    """By planning on tensors that hold nothing; no key knows a length."""
    shape = tune.Shape("bfloat16", views=3, heads=4, head_dim=64, width=64, k=8, metric="cosine")
    rows = tune.listing(tune.select(tune.KERNELS, shape, torch.device("meta")))
    assert len(rows) == 2 + 3 + 1
    case = test_cross_view.make(2, 3, 4, 64, dtype=torch.bfloat16)
    assert rows[0].pinned == cross_view._config(case.q, False)
    assert rows[1].pinned == cross_view._config(case.q, True)
    for row in rows:
        assert row.candidates > 5
        assert not row.measured
        assert not any(str(length) in row.key for length in (1 << 18, 1024, 20_000))
    assert not own_file.exists()


def test_a_foreign_file_is_named(own_file: Path) -> None:
    own_file.parent.mkdir()
    own_file.write_text('{"GPU": {"key": 3}}')
    with pytest.raises(DataError, match=re.escape(str(own_file))):
        test_cross_view.make(2, 2, 1, 8).forward()
    with pytest.raises(DataError, match="remove it"):
        _tuning.measured()


def test_nothing_is_written_unasked(own_file: Path) -> None:
    test_cross_view.make(2, 2, 1, 8).forward()
    assert not own_file.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["cross_view"])
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["cross", "--dry-run"])
    assert "KERNEL: expected cross_view or" in capsys.readouterr().err
    tune.main(["cross_view", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("cross_view forward torch.bfloat16 V=3 H=4 Dh=64: pinned BD=64 ")
    assert lines[-1] == f"kept in {_tuning.tuning_file()}"
