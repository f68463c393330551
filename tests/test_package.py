"""What leaves the repository: the source distribution, and a wheel whose library could not be built.

The wheel with its library is built from the source distribution as `make package` does it, before `make test` runs any
test: the library that all tests run is the one of that wheel.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


def run(folder: Path, *command: str, **environment: str) -> str:
    """Output of a Python command in `folder`; its error output is shown where it fails."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked into an empty folder."""
    place = tmp_path_factory.mktemp("sdist")
    run(ROOT, "-c", BUILD.format(kind="sdist"), str(place))
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return next(path for path in place.iterdir() if path.is_dir())


def tracked(*folders: str) -> set[str]:
    """Files of the repository in `folders`; those of the working tree where there is no git."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(listed.splitlines())


def test_the_source_distribution_has_every_source(unpacked: Path) -> None:
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert tracked("csrc", "umda_fast", "kernels", "bench/*.py", "docs", "examples") - there == set()
    assert not [name for name in there if name.startswith("tests/") or name.endswith((".so", ".o", ".pyc"))]


def test_a_wheel_without_its_library_says_so(unpacked: Path, tmp_path: Path) -> None:
    """Loudly while it is built, in its name, and in what the backend gives as its reason."""
    said = run(unpacked, "-c", BUILD.format(kind="wheel"), str(tmp_path), CXX="no-such-compiler", UMDA_FAST_CUDA="0")
    assert "umda_fast._C was NOT built" in said
    assert "this wheel holds NO native library" in said
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = "from umda_fast import ops; print(ops.__file__); print(ops.backend_status()['cpp'])"
    where, reason = run(tmp_path / "empty", "-c", code, PYTHONPATH=str(tmp_path / "site")).strip().splitlines()
    assert Path(where).is_relative_to(tmp_path / "site")
    assert "no C++ compiler found" in reason


def test_links_of_the_readme_work_outside_the_repository() -> None:
    spec = importlib.util.spec_from_file_location("umda_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup  # its dataclasses ask for it
    spec.loader.exec_module(setup)
    text = setup.standalone((ROOT / "README.md").read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)
    assert setup.standalone("[docs/data.md](docs/data.md), [why](docs/model.md#4), [torchjd](https://torchjd.org)") == (
        "docs/data.md, why (docs/model.md in the repository), [torchjd](https://torchjd.org)"
    )
