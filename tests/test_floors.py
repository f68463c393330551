"""The floors of the house: imports only go down, and packages of one floor do not import each other.

cli > bench > train, parity > data, sgl > model, pyg > ops > reference | kernels > errors
"""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"errors", "heap"},
    {"reference", "kernels"},
    {"ops"},
    {"model", "pyg"},
    {"data", "sgl"},
    {"train", "parity"},
    {"bench"},
    {"cli"},
)
OUTSIDE = ("bench", "kernels")
FLOOR = {package: height for height, packages in enumerate(FLOORS) for package in packages}


def sources() -> list[tuple[str, Path]]:
    """(package, file) of every module of umda_fast; a module at the top is a package of its own."""
    found = [(path.relative_to(ROOT / "umda_fast").parts[0], path) for path in (ROOT / "umda_fast").rglob("*.py")]
    # Top folders that are installed inside the package.
    found += [(folder, path) for folder in OUTSIDE for path in (ROOT / folder).rglob("*.py")]
    return [(package.removesuffix(".py"), path) for package, path in found]


def imported(tree: ast.AST, package: str) -> set[str]:
    """Packages of umda_fast that a module imports anywhere, inside functions as well."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"an import from above {package}"
            if node.level == 1:  # of its own package, for no package holds another
                continue
            modules.add(node.module or "")
            if node.module == "umda_fast":
                modules |= {f"umda_fast.{name.name}" for name in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            modules.add(str(node.args[0].value))
    return {name.split(".")[1] for name in modules if name.startswith("umda_fast.")}


def violations(package: str, names: set[str]) -> list[str]:
    """What a module of ``package`` must not import."""
    return [name for name in sorted(names - {package}) if name in FLOOR and FLOOR[name] >= FLOOR[package]]


def test_every_package_has_a_floor() -> None:
    packages = {package for package, _ in sources()} - {"__init__"}
    assert packages == set(FLOOR)


def test_every_package_is_installed() -> None:
    """pyproject.toml names them one by one: a wheel must not lack one that the editable install has."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {f"umda_fast.{folder}" for folder in OUTSIDE}
    there |= {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "umda_fast").rglob("__init__.py")}
    assert set(settings["packages"]) == there


@pytest.mark.parametrize("package", sorted(FLOOR))
def test_imports_only_go_down(package: str) -> None:
    wrong = []
    for where, path in sources():
        if where == package:
            names = imported(ast.parse(path.read_text()), package)
            wrong += [f"{path.relative_to(ROOT)} imports umda_fast.{name}" for name in violations(package, names)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("package", "line", "forbidden"),
    [
        ("reference", "from umda_fast.kernels import knn", ["kernels"]),
        ("kernels", "from umda_fast import reference", ["reference"]),
        ("reference", "import umda_fast.ops.knn", ["ops"]),
        ("model", "def f():\n    from umda_fast.sgl import SelfGuided", ["sgl"]),
        ("train", "import_module('umda_fast.parity')", ["parity"]),
        ("parity", "from umda_fast.bench.measure import compare", ["bench"]),
        ("data", "from umda_fast.model.specs import TaskSpec", []),
        ("ops", "from umda_fast.reference.knn import knn\nfrom umda_fast.errors import DataError", []),
    ],
)
def test_the_test_sees_what_it_must(package: str, line: str, forbidden: list[str]) -> None:
    assert violations(package, imported(ast.parse(line), package)) == forbidden


def test_kernels_are_imported_on_first_use_only() -> None:
    """Nothing imports triton outside of kernels/, and no statement at the top of a module imports kernels."""
    for package, path in sources():
        if package == "kernels":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names]
                assert not any(name == "triton" or name.startswith("triton.") for name in names), path
        assert "kernels" not in imported(ast.Module([x for x in tree.body if isinstance(x, ast.Import)], []), package)


def test_no_path_of_a_machine_in_the_package() -> None:
    places = ("/home/", "/tmp/", f"{Path.home()}/", f"{ROOT}/")
    for _, path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(places), path
