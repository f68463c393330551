"""Compares the machine code of every kernel in two trees: shows that a move changed nothing, or what a change changed.

    python -m tests.machine_code.compare REV                        # REV against the working tree
    python -m tests.machine_code.compare REV OTHER -k cross_view    # two commits, some kernels
    python -m tests.machine_code.compare REV --at-most noise        # exit code 1 if anything is worse than noise

A kernel is one of a case of ``tests/kernels/aot_cases.py``, or of the CUDA library where ``csrc`` differs, for one
architecture. Its verdict is the first that holds:

    identical   the same instructions, operands and order (a renamed kernel is found by its code)
    reordered   the same instructions in another order or other registers, and the same resources
    noise       no path got longer by more than 1 %, and what it takes and what is predicted of it are the same
    real        anything else, and what it is
    added, removed
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_host import _nvcc

from .binary import Binary, read, read_library
from .catalogue import TARGETS, kept_kernels
from .cost import path, predict, work
from .devices import DEVICES

__all__ = ["VERDICTS", "Verdict", "compare", "judge", "kernels_of"]

ROOT = _nvcc.ROOT
#: From harmless to not.
VERDICTS = ("identical", "reordered", "noise", "real", "added", "removed")
#: Share by which the instructions of a path may change and be noise.
NOISE = 0.01

Name = tuple[str, str, int]  #: case, kernel, architecture


@dataclass(frozen=True)
class Verdict:
    """What became of a kernel; ``changes`` says in words what is not the same."""

    name: Name
    verdict: str
    changes: tuple[str, ...] = ()


def _code(binary: Binary) -> list[tuple[str, str, str]]:
    """Instructions with their operands; labels by where they point, for their numbers mean nothing."""
    labels = {label: str(place) for label, place in binary.function.labels.items()}

    def operands(text: str) -> str:
        return re.sub(r"\.L\w+", lambda found: labels.get(found[0], found[0]), text)

    # A constant's place in its bank is part of the code; a function's own name is not.
    name = re.escape(binary.function.name)
    return [(x.predicate, x.opcode, re.sub(name, "", operands(x.operands))) for x in binary.function.code]


def _resources(binary: Binary) -> dict[str, int]:
    return {
        "registers": binary.registers,
        "shared memory": binary.shared,
        "stack": binary.stack,
        "local memory": binary.local,
        "threads": binary.threads,
    }


def _widths(binary: Binary) -> dict[str, int]:
    return {
        f"{unit} of {width} bytes": count
        for unit in ("load", "store", "copy")
        for width, count in binary.function.widths(unit).items()
    }


def _differences(before: dict[str, int], after: dict[str, int]) -> list[str]:
    names = sorted({*before, *after})
    return [
        f"{name} {before.get(name, 0)} -> {after.get(name, 0)}"
        for name in names
        if before.get(name, 0) != after.get(name, 0)
    ]


def judge(name: Name, before: Binary, after: Binary) -> Verdict:
    """The verdict on a kernel that is in both trees."""
    old, new = _code(before), _code(after)
    resources = _differences(_resources(before), _resources(after))
    if old == new and not resources:
        return Verdict(name, "identical")
    opcodes = [Counter(opcode for _, opcode, _ in code) for code in (old, new)]
    loops = [sorted((len(x.body), x.depth) for x in binary.function.loops) for binary in (before, after)]
    if opcodes[0] == opcodes[1] and loops[0] == loops[1] and not resources:
        return Verdict(name, "reordered")
    device = DEVICES[name[2]]
    paths = [work(path(binary.function)) for binary in (before, after)]
    predictions = [predict(binary, device) for binary in (before, after)]
    changes = resources + _differences(_widths(before), _widths(after))
    changes += [
        f"{unit} instructions on its path {paths[0].units.get(unit, 0):.0f} -> {paths[1].units.get(unit, 0):.0f}"
        for unit in sorted({*paths[0].units, *paths[1].units})
        if paths[0].units.get(unit, 0) != paths[1].units.get(unit, 0)
    ]
    shares = [f"{x.share:.0%} of the {x.of} rate ({x.bound})" for x in predictions]
    harmless = (
        not _differences(_widths(before), _widths(after))
        and predictions[0].programs == predictions[1].programs
        and after.stack <= before.stack
        and after.local <= before.local
        and paths[1].slots <= (1 + NOISE) * paths[0].slots
        and len(new) <= (1 + NOISE) * len(old)
        and shares[0] == shares[1]
    )
    if harmless:
        return Verdict(name, "noise", tuple(changes))
    if shares[0] != shares[1]:
        changes.append(f"predicted on {device.name}, all code around its loops left out: {shares[0]} -> {shares[1]}")
    return Verdict(name, "real", tuple(changes))


def compare(before: dict[Name, Binary], after: dict[Name, Binary]) -> list[Verdict]:
    """A verdict for every kernel of either tree."""
    found = [judge(name, before[name], after[name]) for name in before if name in after]
    missing = {name: before[name] for name in before if name not in after}
    for name in after:
        if name in before:
            continue
        there = ((x, old) for x, old in missing.items() if x[2] == name[2])
        same = [x for x, old in there if judge(x, old, after[name]).verdict == "identical"]
        if same:
            del missing[same[0]]
            found.append(Verdict(name, "identical", (f"was {same[0][0]}: {same[0][1]}",)))
        else:
            found.append(Verdict(name, "added"))
    return found + [Verdict(name, "removed") for name in missing]


def kernels_of(tree: Path, architectures: Sequence[int], pattern: str, *, cuda: bool) -> dict[Name, Binary]:
    """Compiles the kernels of a tree, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("trees.py")
        command = [sys.executable, str(script), folder, ",".join(map(str, architectures)), pattern]
        with kept_kernels():
            environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
            subprocess.run([*command, *(["--cuda"] if cuda else [])], cwd=tree, check=True, env=environment)
        index = json.loads((Path(folder) / "index.json").read_text())
        found: dict[Name, Binary] = {}
        for x in index["kernels"]:
            [binary] = read(Path(folder) / x["file"]).values()
            numbers = binary.registers, binary.stack, x["shared"], binary.local, x["threads"]
            found[x["case"], x["kernel"], x["architecture"]] = Binary(binary.function, *numbers)
    if index["library"] is not None:
        for architecture in architectures:
            binaries = read_library(Path(index["library"]), TARGETS[architecture])
            names = _nvcc.short_names(list(binaries))
            found |= {
                ("CUDA", names[name], architecture): binary
                for name, binary in binaries.items()
                if re.search(pattern, f"CUDA: {names[name]}")
            }
    return found


def _checkout(revision: str, folder: Path) -> Path:
    """The tree of a commit, with this one's ``build/``, where what is compiled is kept."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    (ROOT / "build").mkdir(exist_ok=True)
    (folder / "build").symlink_to(ROOT / "build")
    return folder


def main() -> int:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="REV", help="commit")
    parser.add_argument("after", metavar="OTHER", nargs="?", help="commit; the working tree if left out")
    parser.add_argument("-k", dest="pattern", default="", help="regular expression on 'case: kernel'")
    parser.add_argument("--architectures", default="80,90,100", help="compute capabilities, as in 80,90,100")
    parser.add_argument("--at-most", choices=VERDICTS[:4], default="real", help="the worst verdict with exit code 0")
    options = parser.parse_args()
    try:
        architectures = [int(x) for x in options.architectures.split(",")]
        unknown = [x for x in architectures if x not in DEVICES]
    except ValueError:
        unknown = [options.architectures]
    if unknown:
        parser.error(f"--architectures: {unknown[0]} is not one of {', '.join(map(str, DEVICES))}")
    try:
        re.compile(options.pattern)
    except re.error as error:
        parser.error(f"-k: {options.pattern!r} is no regular expression: {error}")
    for revision in filter(None, (options.before, options.after)):
        known = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
        if subprocess.run(known, cwd=ROOT, capture_output=True, check=False).returncode:
            parser.error(f"{revision} is no commit here")
    revisions = [x for x in (options.before, options.after) if x is not None]
    sources = ["git", "diff", "--quiet", *revisions, "--", "csrc", "setup.py"]
    cuda = subprocess.run(sources, cwd=ROOT, check=False).returncode != 0
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        trees = [_checkout(options.before, Path(one))]
        trees.append(_checkout(options.after, Path(two)) if options.after else ROOT)
        before, after = (kernels_of(tree, architectures, options.pattern, cuda=cuda) for tree in trees)
    verdicts = compare(before, after)
    if not verdicts:
        parser.error(f"-k: no kernel matches {options.pattern!r}")
    for x in sorted(verdicts, key=lambda x: (VERDICTS.index(x.verdict), x.name)):
        print(f"{x.verdict:9}  sm_{x.name[2]:<3}  {x.name[0]}: {x.name[1]}")
        for change in x.changes:
            print(f"{'':18}{change}")
    counts = Counter(x.verdict for x in verdicts)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]))
    if not cuda:
        print("CUDA: csrc and setup.py are the same")
    worst = max(VERDICTS.index(x.verdict) for x in verdicts)
    return int(worst > VERDICTS.index(options.at_most) and options.at_most != "real")


if __name__ == "__main__":
    sys.exit(main())
