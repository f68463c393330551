"""Machine code of NVIDIA GPUs (SASS), read from a cubin: instructions, what unit each occupies, and the loops.

The disassembler is ``nvdisasm``, which Triton carries. A loop is a natural loop of the control-flow graph: a jump back
to an instruction that every path to the jump passes, with all that can reach the jump from there (Aho, Lam, Sethi and
Ullman, *Compilers*, 2nd edition, 9.6). The order in which blocks lie in memory does not matter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

__all__ = ["Function", "Instruction", "Loop", "disassemble", "functions_of", "tool"]

#: Opcodes, up to the first dot, by the unit that they occupy beside the issue slot. What is not named is "integer".
UNITS: dict[str, tuple[str, ...]] = {
    "tensor": ("HMMA", "HGMMA", "IMMA", "IGMMA", "DMMA", "QGMMA", "OMMA", "QMMA", "UTCHMMA", "UTCOMMA", "UTCQMMA"),
    "float": (
        *("FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "FSETP", "FCHK", "FSET", "FFMA2", "FADD2", "FMUL2", "HFMA2"),
        *("HADD2", "HMUL2", "HMNMX2", "HSETP2", "FMNMX3", "FSWZADD"),
    ),
    "double": ("DFMA", "DADD", "DMUL", "DSETP"),
    "special": ("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO", "BREV"),
    "load": ("LDG", "LD"),
    "store": ("STG", "ST"),
    "copy": ("LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG", "UBLKPF"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "LDTM", "STTM", "ATOMS", "LDCM"),
    "constant": ("LDC", "ULDC", "LDCU"),
    "local": ("LDL", "STL"),
    "atomic": ("ATOM", "ATOMG", "RED", "REDG", "REDUX", "REDAS"),
    "shuffle": ("SHFL", "VOTE", "VOTEU", "MATCH"),
    "barrier": (
        *("BAR", "DEPBAR", "SYNCS", "LDGDEPBAR", "WARPGROUP", "ARRIVES", "MEMBAR", "FENCE", "ERRBAR"),
        *("UCGABAR_ARV", "UCGABAR_WAIT"),
    ),
    "control": (
        *("BRA", "BRX", "EXIT", "CALL", "RET", "NOP", "BREAK", "JMP", "YIELD", "NANOSLEEP", "BMOV", "ELECT"),
        *("BSSY", "BSYNC", "WARPSYNC", "COLLECTIVE", "ENDCOLLECTIVE"),
    ),
}
_UNIT = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes}

_FUNCTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L\w+):$")
_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\((\.L\w+)\)")
_BARRIER = re.compile(r"\bB\d+\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``opcode`` with its modifiers, ``predicate`` empty where it always runs."""

    address: int
    predicate: str
    opcode: str
    operands: str
    target: str | None = None  #: label that is jumped to

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def unit(self) -> str:
        """One of `UNITS`, else ``uniform`` (the path of scalars) or ``integer``."""
        found = _UNIT.get(self.name)
        if found is None:
            return "uniform" if self.name.startswith("U") or self.name == "R2UR" else "integer"
        return found

    @property
    def width(self) -> int:
        """Bytes per lane of a load, a store or a copy."""
        for part in self.opcode.split(".")[1:]:
            if part in ("U8", "S8", "8"):
                return 1
            if part in ("U16", "S16", "16", "BF16", "F16"):
                return 2
            if part in ("64", "128", "256"):
                return int(part) // 8
        return 4


@dataclass(frozen=True)
class Loop:
    """A natural loop: places of its instructions, those of loops inside included."""

    head: int
    body: frozenset[int]
    depth: int  #: 1 for an outermost loop


@dataclass(frozen=True)
class Function:
    """A kernel: its instructions in the order in which they lie, and where labels point."""

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]  #: label -> place in ``code``

    def widths(self, unit: str) -> Counter[int]:
        """How many of a unit's instructions have which width in bytes."""
        return Counter(x.width for x in self.code if x.unit == unit)

    def units(self, places: Iterable[int] | None = None) -> Counter[str]:
        """Instructions by unit, of the places given or of all."""
        chosen = self.code if places is None else [self.code[place] for place in places]
        return Counter(x.unit for x in chosen)

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """Basic blocks as [begin, end) places."""
        starts = {0, *self.labels.values()}
        for place, x in enumerate(self.code):
            if x.name in ("BRA", "BRX", "JMP", "EXIT", "RET", "BSYNC"):
                starts.add(place + 1)
        ordered = sorted(place for place in starts if place < len(self.code))
        return list(zip(ordered, [*ordered[1:], len(self.code)], strict=True))

    @cached_property
    def successors(self) -> list[list[int]]:
        """Of every block, the blocks that may follow."""
        block_at = {begin: index for index, (begin, _) in enumerate(self.blocks)}
        joins: dict[str, list[int]] = {}
        for x in self.code:
            if x.name == "BSSY" and x.target is not None and (found := _BARRIER.search(x.operands)):
                joins.setdefault(found[0], []).append(self.labels[x.target])
        following: list[list[int]] = []
        for _, end in self.blocks:
            last = self.code[end - 1]
            targets: list[int] = []
            falls = True
            if last.name in ("BRA", "JMP") and last.target is not None:
                targets.append(self.labels[last.target])
                # A second, uniform predicate may stand among the operands.
                falls = bool(last.predicate) or re.search(r"!?U?P\d", last.operands) is not None
                falls = falls or ".DIV" in last.opcode
            elif last.name in ("EXIT", "RET"):
                falls = bool(last.predicate)
            elif last.name == "BSYNC":
                found = _BARRIER.search(last.operands)
                where = joins.get(found[0], []) if found else []
                if end not in where and where:
                    # Out of line: on to where the threads that parted meet, the nearest such place.
                    targets.append(min(where, key=lambda place: abs(place - end)))
                    falls = False
            if falls and end < len(self.code):
                targets.append(end)
            following.append(sorted({block_at[target] for target in targets if target in block_at}))
        return following

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops by place of their head; loops of one head are one."""
        dominators = _dominators(self.successors)
        before: dict[int, set[int]] = {}
        for block, following in enumerate(self.successors):
            for successor in following:
                before.setdefault(successor, set()).add(block)
        bodies: dict[int, set[int]] = {}
        for block, following in enumerate(self.successors):
            for head in following:
                if block not in dominators or head not in dominators[block]:
                    continue
                body, waiting = bodies.setdefault(head, {head}), [block]
                while waiting:
                    here = waiting.pop()
                    if here not in body and here in dominators:
                        body.add(here)
                        waiting += before.get(here, ())
        found = []
        for head, body in sorted(bodies.items()):
            places = frozenset(place for block in body for place in range(*self.blocks[block]))
            depth = sum(body <= other for other in bodies.values())
            found.append(Loop(self.blocks[head][0], places, depth))
        return found

    def innermost(self) -> list[Loop]:
        """Loops that hold no other."""
        return [x for x in self.loops if not any(y.body < x.body for y in self.loops)]


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Of every block that can be reached from the first, the blocks that all paths to it pass, itself included."""
    order: list[int] = []
    seen = {0}
    waiting = [(0, iter(successors[0]))] if successors else []
    while waiting:  # depth first; `order` gets a block when all behind it is done
        block, rest = waiting[-1]
        successor = next((x for x in rest if x not in seen), None)
        if successor is None:
            order.append(block)
            waiting.pop()
        else:
            seen.add(successor)
            waiting.append((successor, iter(successors[successor])))
    order.reverse()
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in successors[block]:
            before[successor].append(block)
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            found = {block} | set.intersection(*(dominators[x] for x in before[block]))
            if found != dominators[block]:
                dominators[block], changed = found, True
    return dominators


def tool(name: str) -> Path:
    """``nvdisasm`` or ``cuobjdump``, of the CUDA tools that Triton carries."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassemble(cubin: Path | bytes) -> dict[str, Function]:
    """The kernels of a cubin by (mangled) name."""
    if isinstance(cubin, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return disassemble(Path(file.name))
    command = [str(tool("nvdisasm")), "-c", str(cubin)]
    return functions_of(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def functions_of(text: str) -> dict[str, Function]:
    """The kernels in what ``nvdisasm -c`` prints."""
    found: dict[str, Function] = {}
    name: str | None = None
    code: list[Instruction] = []
    labels: dict[str, int] = {}

    def close() -> None:
        if name is not None and code:
            found[name] = Function(name, tuple(code), dict(labels))

    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            close()
            name, code, labels = match[1], [], {}
        elif match := _LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := _INSTRUCTION.match(line):
            target = _TARGET.search(match["operands"])
            code.append(
                Instruction(
                    int(match["address"], 16),
                    match["predicate"] or "",
                    match["opcode"],
                    match["operands"].strip(),
                    target[1] if target else None,
                )
            )
    close()
    return found
