"""Where a package of an extra is missing, what needs it says so, and which extra brings it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest

from umda_fast import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.extras import EXTRAS, TRAINING, MissingExtraError, require

ROOT = Path(__file__).resolve().parents[1]
#: Distributions by what they are imported as, where the names differ.
CALLED = {
    "lightning_fabric": "lightning-fabric",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "torch_geometric": "torch-geometric",
    "sentence_transformers": "sentence-transformers",
}
#: In one process: what is done without which package. Each must say so in one line and name the extra.
WITHOUT = """
import json, sys, traceback
from importlib import import_module, invalidate_caches
from importlib.machinery import PathFinder
import torch, numpy  # look for optional packages themselves
gone = set()
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in gone else find_spec(name, *rest)
def saved():
    from umda_fast.model import UMDA, UMDAConfig, ViewSpec, TaskSpec
    UMDA(UMDAConfig((ViewSpec("x", 4),), (TaskSpec("y", "binary"),), width=8, heads=1)).save_pretrained("new")
def loaded():
    from umda_fast import UMDA
    UMDA.from_pretrained("m")
def slides():
    from umda_fast.data import load_source
    load_source("d")
def digits():
    from umda_fast.data import load_source
    load_source("digits")
def balancer():
    from umda_fast.sgl import TorchJDBalancer
    TorchJDBalancer(None)
def table():
    from umda_fast.data.files.tables import read_table
    from pathlib import Path
    read_table(Path("t.xlsx"))
def searching():
    from umda_fast.studies import search
    from umda_fast.train import make_config
    search(make_config(), "new")
def skipping():
    from umda_fast.data import load_source
    load_source("d", skip_bad=True)
cases = [
    ("umda_fast.train", "pydantic"), ("umda_fast.train", "lightning_fabric"), ("umda_fast.train", "tensorboard"),
    ("umda_fast.studies", "matplotlib"), ("umda_fast.score", "torchmetrics"), ("umda_fast.pyg", "torch_geometric"),
    (saved, "safetensors"), (loaded, "safetensors"), (slides, "h5py"), (skipping, "h5py"), (digits, "sklearn"),
    (balancer, "torchjd"), (table, "openpyxl"), (searching, "optuna"),
]
said = {}
for what, package in cases:
    gone = {package}
    name = what if isinstance(what, str) else what.__name__
    try:
        import_module(what) if isinstance(what, str) else what()
        said[f"{name} without {package}"] = None
    except ImportError as error:
        said[f"{name} without {package}"] = [type(error).__name__, str(error), error.name]
    except Exception as error:
        said[f"{name} without {package}"] = [type(error).__name__, str(error), None]
print(json.dumps(said))
"""


def test_the_table_is_that_of_the_installation() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(line.startswith(CALLED.get(package, package)) for line in extras[extra]), package
    assert {EXTRAS[package] for package in TRAINING} == {"train"}


def test_what_is_there_is_no_error() -> None:
    require("nothing", *EXTRAS)


def test_everything_names_the_extra_that_it_needs(tmp_path: Path) -> None:
    UMDA(UMDAConfig((ViewSpec("x", 4),), (TaskSpec("y", "binary"),), width=8, heads=1)).save_pretrained(tmp_path / "m")
    (tmp_path / "d").mkdir()
    with h5py.File(tmp_path / "d" / "S1.h5", "w") as file:
        file["features"] = np.zeros((3, 4), dtype=np.float32)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 14
    for case, found in said.items():
        package = case.rpartition(" ")[2]
        assert found is not None, case
        kind, text, name = found
        assert kind == "MissingExtraError", (case, found)
        assert name == package
        extra = EXTRAS[package]
        assert text.endswith(f"needs {package}, of the extra {extra}: pip install 'umda_fast[{extra}]'")
        assert "\n" not in text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["typer", "matplotlib", "rich"])
def test_a_command_says_it_in_one_line(package: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"
        "from umda_fast.cli import main\n"
        "main(['train', '--epochs', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 4
    [line] = done.stderr.splitlines()
    assert line.startswith("umda-fast: ")
    assert line.endswith(f"needs {package}, of the extra train: pip install 'umda_fast[train]'")


def test_an_error_is_an_import_error() -> None:
    error = MissingExtraError("this", "h5py")
    assert isinstance(error, ModuleNotFoundError)
    assert (error.name, str(error)) == ("h5py", "this needs h5py, of the extra io: pip install 'umda_fast[io]'")
