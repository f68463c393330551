"""The floors of the house: imports only go down, and rooms of one floor do not import each other.

A room is a package, or a part of one that has a floor of its own (`data.files`). docs/development.md has the map.
"""

import ast
import functools
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"errors", "extras", "heap", "files", "blocks"},
    {"reference", "kernels"},
    {"ops", "tasks"},
    {"model", "pyg"},
    {"data", "sgl"},
    {"data.files"},
    {"data.sources"},
    {"runtime"},
    {"score", "profiling"},
    {"train", "parity"},
    {"studies"},
    {"bench"},
    {"cli"},
)
OUTSIDE = ("bench", "kernels")  # top folders that are installed inside the package
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# A package's face hands on what its rooms have; and `umda_fast.train` hands on names that moved up to `studies`.
DOORS = {("data/__init__.py", "data.files"), ("data/__init__.py", "data.sources"), ("train/__init__.py", "studies")}


def room_of(module: str) -> str:
    """The room of a module `a.b.c` of umda_fast: the longest part of its name that has a floor."""
    parts = module.split(".")
    rooms = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((room for room in rooms if room in FLOOR), parts[0])


@functools.cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of umda_fast by its whole name, a package by that of its folder: file and syntax tree."""
    folders = [("umda_fast", ROOT / "umda_fast"), *((f"umda_fast.{folder}", ROOT / folder) for folder in OUTSIDE)]
    found = {}
    for package, top in folders:
        for path in top.rglob("*.py"):
            name = ".".join((package, *path.relative_to(top).with_suffix("").parts)).removesuffix(".__init__")
            found[name] = path, ast.parse(path.read_text())
    return found


def sources() -> list[tuple[str, Path, ast.Module]]:
    """(room, file, syntax tree) of every module of umda_fast but its face; one at the top is a room of its own."""
    return [
        (room_of(name.removeprefix("umda_fast.")), *rest) for name, rest in modules().items() if name != "umda_fast"
    ]


def imports(tree: ast.AST, package: str = "") -> set[str]:
    """Whole names of what a module imports anywhere, inside functions and for types as well."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "an import from above its package"
            own = f"umda_fast.{package}" if node.level else ""
            whole = ".".join(part for part in (own, node.module) if part)
            names |= {f"{whole}.{name.name}" for name in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    return names


def imported(tree: ast.AST, package: str = "") -> set[str]:
    """Rooms of umda_fast that a module imports."""
    names = imports(tree, package)
    return {room_of(name.removeprefix("umda_fast.")) for name in names if name.startswith("umda_fast.")}


def violations(room: str, names: set[str]) -> list[str]:
    """What a module of ``room`` must not import."""
    return [name for name in sorted(names - {room}) if name in FLOOR and FLOOR[name] >= FLOOR[room]]


def test_every_room_has_a_floor() -> None:
    assert {room for room, _, _ in sources()} == set(FLOOR)


def test_every_package_is_installed() -> None:
    """pyproject.toml names them one by one: a wheel must not lack one that the editable install has."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {f"umda_fast.{folder}" for folder in OUTSIDE}
    there |= {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "umda_fast").rglob("__init__.py")}
    assert set(settings["packages"]) == there


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_imports_only_go_down(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports umda_fast.{name}"
        for where, path, tree in sources()
        if where == room
        for name in violations(room, imported(tree, room))
        if not any(path == ROOT / "umda_fast" / face and name == behind for face, behind in DOORS)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_door_is_used() -> None:
    for face, behind in DOORS:
        assert behind in imported(ast.parse((ROOT / "umda_fast" / face).read_text())), face


def test_no_circle_of_files() -> None:
    """No file imports itself by way of others; imports for types only, or inside functions, count too."""
    arrows: dict[str, set[str]] = {}
    for name, (path, tree) in modules().items():
        taken = imports(tree, room_of(name.removeprefix("umda_fast.")))
        arrows[name] = {whole if whole in modules() else whole.rpartition(".")[0] for whole in taken} & set(modules())
        arrows[name] -= {f"umda_fast.{behind}" for face, behind in DOORS if path == ROOT / "umda_fast" / face}
    arrows["umda_fast"] = set()  # hands on names on first use
    # What imports nothing that is still there is on no circle; what is left when nothing more can go, is.
    while free := {name for name, below in arrows.items() if not below & arrows.keys()}:
        arrows = {name: below for name, below in arrows.items() if name not in free}
    assert not arrows, {name: sorted(below & arrows.keys()) for name, below in arrows.items()}


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
        ("data", "from umda_fast.data import files", ["data.files"]),
        ("data.files", "from umda_fast.data.sources.npz import read_npz", ["data.sources"]),
        ("data.sources", "from umda_fast.data.bag import Bag", []),
        ("ops", "from umda_fast.reference.knn import knn\nfrom umda_fast.errors import DataError", []),
    ],
)
def test_the_test_sees_what_it_must(package: str, line: str, forbidden: list[str]) -> None:
    assert violations(package, imported(ast.parse(line))) == forbidden


def test_kernels_are_imported_on_first_use_only() -> None:
    """Nothing imports triton outside of kernels/, and no statement at the top of a module imports kernels."""
    for package, path, tree in sources():
        if package == "kernels":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names]
                assert not any(name == "triton" or name.startswith("triton.") for name in names), path
        assert "kernels" not in imported(ast.Module([x for x in tree.body if isinstance(x, ast.Import)], []))


def test_no_path_of_a_machine_in_the_package() -> None:
    places = ("/home/", "/tmp/", f"{Path.home()}/", f"{ROOT}/")
    for _, path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(places), path
