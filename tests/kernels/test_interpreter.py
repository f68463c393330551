"""Gate 1: every Triton kernel, forward and backward, in Triton's interpreter against the float64 reference.

The tests proper are the other modules beside this file; see ``conftest.py`` for why they run in processes of their own,
of which there are two, for each of them imports torch and Triton.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED_MODULES

HERE = Path(__file__).parent

#: Modules by process: dealt out by length, so that both take about as long.
BY_LENGTH = sorted(INTERPRETED_MODULES, key=lambda name: -(HERE / name).stat().st_size)
SHARES = [BY_LENGTH[first::2] for first in range(2)]


class Share:
    """A pytest of some modules, which has been started; ``outcomes`` waits for it."""

    def __init__(self, modules: list[str], report: Path) -> None:
        self.report = report
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
                *(str(HERE / module) for module in modules),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=HERE.parent.parent,
        )
        self.output: str | None = None

    def outcomes(self, module: str) -> list[str]:
        """How each test of the module ended: ``passed``, else what happened and what was printed about it."""
        if self.output is None:
            self.output, _ = self.process.communicate()
        # 1: some tests failed, which are found below; anything above, and nothing is known of the others.
        assert self.process.returncode in (0, 1), self.output
        name = f"{HERE.parent.name}.{HERE.name}.{Path(module).stem}"
        ended = []
        for case in ET.parse(self.report).iter("testcase"):
            if case.get("classname") == name:
                problems = [x for x in case if x.tag in ("failure", "error", "skipped")]
                said = [f"{case.get('name')}: {x.tag}\n{x.text or x.get('message')}" for x in problems]
                ended.append("\n".join(said) or "passed")
        return ended


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Share]]:
    folder = tmp_path_factory.mktemp("interpreted")
    started = {
        module: share
        for number, modules in enumerate(SHARES)
        for share in [Share(modules, folder / f"{number}.xml")]
        for module in modules
    }
    yield started
    for share in started.values():
        share.process.kill()


@pytest.mark.parametrize("module", INTERPRETED_MODULES)
def test_interpreted(module: str, shares: dict[str, Share]) -> None:
    """Every test of the module ran and passed; none was skipped."""
    ended = shares[module].outcomes(module)
    assert ended, f"no test of {module} ran"
    problems = [one for one in ended if one != "passed"]
    assert not problems, "\n\n".join(problems)
