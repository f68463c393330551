"""Gate 5, the static cost model: an estimate of what share of the copy or the tensor rate machine code reaches.

A kernel's *path* is what it runs over and over: the innermost loop that multiplies on tensor cores, or else the one
that moves most, with the code around it as often as it comes; a kernel without such a loop is one path from start to
end. Of a path is counted

- what every pipe is given (`Work`): issue slots, float and integer results, transcendentals, addresses of loads, stores
  and shared memory, bytes of shared memory, tensor FLOP;
- how long one warp needs for it alone (`alone`): instructions go in order, each when its operands are there, so that
  independent loads overlap and chains of them do not. This is interval analysis (Huang et al., "GPUMech", MICRO 2014),
  with registers in place of averages.

Each would bound the rate of a multiprocessor full of resident warps, were latencies and rates what is taken for them;
the least is the prediction (Williams et al., "Roofline", CACM 2009), an estimate that may be off either way. It errs
upwards where nothing is known: random access to memory, bank conflicts, warps of several programs in each other's way,
the last wave, a clock that falls under load. It may err downwards where `alone` takes more for latency than there is.
Of branches the way is taken that moves most in the fewest instructions (`_way`). Lanes that a predicate turns off count
as on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from .binary import Binary
from .devices import SCHEDULERS, SHARED_BYTES, WARP, Device
from .sass import Function, Instruction, Loop

__all__ = ["ONCE", "Nest", "Prediction", "Work", "alone", "hot_loop", "path", "predict", "work"]

_REGISTER = re.compile(r"\b(U?R\d+|U?P\d)\b")
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\.")
_GROUPS = re.compile(r"SB0, (0x[0-9a-f]+)")
_WRITES_NOTHING = frozenset({"store", "barrier", "control"})
#: Cycles until a result can be used, by unit; of what is not named `_ARITHMETIC` (after Luo et al. 2024).
_LATENCY = {"special": 18, "shuffle": 23, "shared": 29, "constant": 29, "atomic": 29, "double": 16, "uniform": 8}
_ARITHMETIC = 4
#: Cycles of a load that the first-level cache serves.
_NEAR = 40.0
_TENSOR_LATENCY = 16
#: How often a loop is run through before it is taken to be in its steady state, and how often after.
_WARM, _RUNS = 8, 8
#: Turns of a loop of which nothing is known (Wu and Larus, "Static branch frequency", MICRO 1994, take about as many).
_TURNS = 8.0


@dataclass(frozen=True)
class Nest:
    """How often loops turn at a shape, which machine code does not say.

    Attributes:
        turns: of the hot loop for one turn of the loop around it, of that one for the next, and so on; code further
            outside is left out. Around an outermost loop lies the whole kernel.
        beside: turns of other loops in the code around.
        inside: turns of loops in the hot one, by depth.
        storing: the hot loop is the one that stores most.
    """

    turns: tuple[float, ...] = ()
    beside: float = 1.0
    inside: tuple[float, ...] = ()
    storing: bool = False


#: Nothing but the hot loop.
ONCE = Nest()


@dataclass(frozen=True)
class Work:
    """What one warp does on a path, in full warps of 32 lanes."""

    units: Mapping[str, float]  #: instructions by unit (`sass.UNITS`)
    pipes: Mapping[str, float]  #: instructions by pipe (`Device.lanes`)
    loaded: float  #: bytes asked of global memory
    stored: float
    shared_bytes: float
    flops: float  #: of the tensor cores; 0 where the instruction does not say its shape
    single: bool  #: tensor instructions of one warp, not of four

    @property
    def slots(self) -> float:
        """Instructions issued."""
        return self.pipes["issue"]

    @property
    def moved(self) -> float:
        """Bytes loaded and stored."""
        return self.loaded + self.stored


@dataclass(frozen=True)
class Prediction:
    """Bounds as shares of the copy rate (``of`` is "copy") or of the dense bfloat16 tensor rate ("tensor")."""

    of: str
    bounds: dict[str, float]
    programs: int  #: resident on a multiprocessor
    warps: int  #: resident on a multiprocessor
    in_flight: float  #: bytes of loads under way, of all resident warps
    cycles: float  #: that a warp needs for the path alone, with those in step

    @property
    def bound(self) -> str:
        """What limits; the measure itself where nothing else does."""
        return min(self.bounds, key=lambda name: (round(self.bounds[name], 3), name != self.of))

    @property
    def share(self) -> float:
        """The least bound, at most 1."""
        return self.bounds[self.bound]


def tensor_flops(x: Instruction) -> float:
    """FLOP of a tensor instruction for each warp that takes part; 0 where its shape is in a register (Blackwell)."""
    if x.name == "HGMMA" and (found := _SHAPE.search(x.opcode + ".")):
        m, n, k = map(int, found.groups())
        return 2.0 * m * n * k / 4  # four warps
    if x.name in ("HMMA", "IMMA"):
        shape = re.search(r"\.(16|8)(8|16)(4|8|16|32)\b", x.opcode)
        if shape is not None:
            m, n, k = map(int, shape.groups())
            return 2.0 * m * n * k
    return 0.0


def _pipe(x: Instruction) -> str | None:
    unit = x.unit
    if unit == "float":
        # Comparisons, minima and selections are done where integers are.
        return "alu" if x.name in ("FMNMX", "FSEL", "FSETP", "FSET", "FMNMX3") else "fma"
    if unit == "integer":
        return "fma" if x.name in ("IMAD", "MOV") else "alu"
    if unit in ("special", "double"):
        return "special"
    if unit in ("load", "store", "copy", "shared", "local", "atomic", "shuffle"):
        return "memory"
    return None


def _widest(code: Sequence[Instruction]) -> dict[str, int]:
    """Bytes of a lane of the widest access by unit. Narrower ones are of indices and statistics, which are small, or of
    branches for other types and the ends of rows, which are not taken: they take slots, but are not what moves."""
    found: dict[str, int] = defaultdict(int)
    for x in code:
        found[x.unit] = max(found[x.unit], x.width)
    return found


def work(code: Sequence[tuple[Instruction, float]]) -> Work:
    """Sums over instructions, each with how often it runs."""
    widest = _widest([x for x, _ in code])
    units: dict[str, float] = defaultdict(float)
    pipes: dict[str, float] = defaultdict(float)
    loaded = stored = shared = flops = 0.0
    single = False
    for x, times in code:
        unit = x.unit
        units[unit] += times
        pipes["issue"] += times
        if (pipe := _pipe(x)) is not None:
            pipes[pipe] += times
        size = times * WARP * x.width
        if unit in ("load", "copy") and x.width == widest[unit]:
            loaded += size
        elif unit == "store" and x.width == widest[unit]:
            stored += size
        if unit in ("shared", "copy"):
            shared += size
        if unit == "tensor":
            flops += times * tensor_flops(x)
            single |= x.name in ("HMMA", "IMMA", "DMMA")
    return Work(units, pipes, loaded, stored, shared, flops, single)


def hot_loop(function: Function, *, storing: bool = False) -> Loop | None:
    """The loop that the time goes to: of those with tensor instructions, else of those that touch global memory, the
    one that runs most of them in its own code if every loop turns `_TURNS` times. None: there is no such loop.

    Args:
        storing: only stores count.
    """

    def weight(loop: Loop) -> tuple[float, float]:
        own = work([(function.code[place], 1.0) for place in loop.body - _inside(function, loop.body)])
        often = _TURNS**loop.depth
        return (0.0 if storing else often * own.units.get("tensor", 0)), often * (own.stored if storing else own.moved)

    weights = [(weight(loop), loop) for loop in function.loops]
    unit = 0 if any(x[0] for x, _ in weights) else 1
    found = [(x[unit], loop) for x, loop in weights if x[unit]]
    return max(found, key=lambda x: x[0])[1] if found else None


def _inside(function: Function, body: frozenset[int]) -> frozenset[int]:
    """Places of the loops inside a loop."""
    return frozenset[int]().union(*(x.body for x in function.loops if x.body < body))


def _way(function: Function, body: frozenset[int], through: frozenset[int], *, loops: bool) -> list[int]:
    """Places on the shortest way through a body that passes most of the accesses that matter: of branches for other
    types, for the ends of rows or for what a shape does not have, the code that moves rows runs the other side.

    Args:
        body: of a loop, or a whole kernel; loops inside are passed once.
        through: a loop inside that has to be passed; none if empty.
        loops: whether other loops inside are passed, where that is possible, or are left out, where that is possible.
    """
    code, blocks = function.code, function.blocks
    inside = [block for block, (begin, _) in enumerate(blocks) if begin in body]
    widest = _widest([code[place] for place in body])
    mattering = {
        place
        for place in body
        if code[place].unit in ("load", "store", "copy", "tensor") and code[place].width == widest[code[place].unit]
    }

    turning = _inside(function, body) if loops else frozenset[int]()

    def value(block: int) -> tuple[int, int, int]:
        places = range(*blocks[block])
        passed = len(mattering.intersection(places)) + bool(turning.intersection(places))
        return len(through.intersection(places)), passed, -len(places)

    # Blocks that lie in the order of a depth-first search have all edges forward but those that close a loop.
    order: list[int] = []
    seen: set[int] = set()
    waiting: list[tuple[int, bool]] = [(inside[0], False)]
    while waiting:
        block, left = waiting.pop()
        if left:
            order.append(block)
        elif block not in seen:
            seen.add(block)
            waiting.append((block, True))
            waiting += [(x, False) for x in function.successors[block] if blocks[x][0] in body and x not in seen]
    position = {block: place for place, block in enumerate(reversed(order))}
    best: dict[int, tuple[tuple[int, int, int], int | None]] = {inside[0]: (value(inside[0]), None)}
    for block in reversed(order):
        if block not in best:
            continue
        here = best[block][0]
        forward = [x for x in function.successors[block] if position.get(x, -1) > position[block]]
        for x in forward:
            more = value(x)
            there = here[0] + more[0], here[1] + more[1], here[2] + more[2]
            if x not in best or there > best[x][0]:
                best[x] = there, block
    # A loop ends where it jumps back, a kernel where nothing follows.
    closing = [x for x in best if inside[0] in function.successors[x]]
    ends = closing or [x for x in best if not function.successors[x]] or list(best)
    last: int | None = max(ends, key=lambda x: best[x][0])
    places: list[int] = []
    while last is not None:
        places += range(*blocks[last])
        last = best[last][1]
    return sorted(places)


def path(function: Function, nest: Nest = ONCE) -> list[tuple[Instruction, float]]:
    """What is run over and over, with how often for each turn of the hot loop: that loop first, then what is around."""
    code = function.code
    whole = frozenset(range(len(code)))
    loop = hot_loop(function, storing=nest.storing)
    if loop is None:
        return [(code[place], 1.0) for place in _way(function, whole, frozenset(), loops=True)]
    often = dict.fromkeys(_way(function, loop.body, frozenset(), loops=True), 1.0)
    for inner in (x for x in function.loops if x.body < loop.body):
        below = inner.depth - loop.depth - 1
        for place in inner.body & often.keys():
            often[place] *= nest.inside[below] if below < len(nest.inside) else 1.0
    found = [(code[place], times) for place, times in sorted(often.items())]
    around = sorted((x.body for x in function.loops if loop.body < x.body), key=len)
    around.append(whole)
    done, share = loop.body, 1.0
    for body, count in zip(around, nest.turns, strict=False):
        share /= count
        beside = frozenset[int]().union(*(x.body for x in function.loops if x.body < body and not loop.body <= x.body))
        found += [
            (code[place], share * (nest.beside if place in beside else 1.0))
            for place in _way(function, body, loop.body, loops=nest.beside > 0)
            if place not in done
        ]
        done = body
    return [(x, times) for x, times in found if times]


def _registers(x: Instruction) -> tuple[list[str], list[str]]:
    """Registers written and registers read, those of a vector by their first."""
    names = _REGISTER.findall(x.operands)
    reads = _REGISTER.findall(x.predicate)
    if x.unit in _WRITES_NOTHING or x.name in ("STS", "STL", "RED", "LDGSTS", "STSM"):
        return [], reads + names
    parts = [part.strip() for part in x.operands.split(",")]
    count = 1
    while count < len(parts) and count < 3 and re.fullmatch(r"U?P(\d|T)", parts[count - 1]):
        count += 1  # predicates are written before, or instead of, a register
    written = [name for part in parts[:count] for name in _REGISTER.findall(part)]
    return written, reads + names[len(written) :]


def alone(
    code: Sequence[Instruction], device: Device, *, latency: float, repeats: bool, abreast: int = 1
) -> tuple[float, float]:
    """Cycles that one warp needs for a path, and how often in that it waits for memory.

    Args:
        latency: cycles of a load of the widest kind on the path; others find what an earlier one of their sector
            brought into the second-level cache.
        repeats: the path is the body of a loop and is measured in its steady state.
        abreast: warps that share a scheduler and go in step, so that each instruction is issued as many times.
    """
    parsed = [(x, *_registers(x)) for x in code]
    widest = _widest(code)["load"]
    ready: dict[str, float] = {}
    from_memory: dict[str, float] = {}  # register -> when its load was issued
    groups: list[tuple[float, float]] = []  # of asynchronous copies: issued, there
    open_group: tuple[float, float] | None = None
    now = tensor_free = 0.0
    waits, last_wait = 0, -1.0
    marks = [(0.0, 0)]

    def waited(issued: float, until: float) -> None:
        nonlocal waits, last_wait
        if until > now and issued >= last_wait:
            waits, last_wait = waits + 1, until

    for _ in range(_WARM + _RUNS if repeats else 1):
        for x, written, read in parsed:
            start = now
            for name in (*read, *written):
                if ready.get(name, 0.0) > start:
                    start = ready[name]
                    if name in from_memory:
                        waited(from_memory[name], start)
            now = start + abreast
            done = now + _LATENCY.get(x.unit, _ARITHMETIC)
            if x.unit == "load":
                done = now + (latency if x.width == widest else min(latency, device.cache_latency))
            elif x.unit == "copy":
                first = open_group[0] if open_group else now
                open_group = (first, now + latency)
            elif x.name == "LDGDEPBAR":
                groups.append(open_group or (now, now))
                open_group = None
            elif x.name == "DEPBAR" and (found := _GROUPS.search(x.operands)):
                left = int(found[1], 16)
                for issued, there in groups[: len(groups) - left]:
                    waited(issued, there)
                    now = max(now, there)
                groups = groups[len(groups) - left :]
            elif x.unit == "tensor":
                rate = (device.tensor if x.name == "HGMMA" else device.warp_tensor) / 4
                tensor_free = max(tensor_free, now) + abreast * tensor_flops(x) / rate
                done = tensor_free + _TENSOR_LATENCY
            elif x.name == "WARPGROUP" and "DEPBAR" in x.opcode and x.operands.endswith("0x0"):
                now = max(now, tensor_free)
            for name in written:
                ready[name] = done
                from_memory.pop(name, None)
                if x.unit == "load" and done > now + _NEAR:
                    from_memory[name] = now
        marks.append((now, waits))
    if not repeats:
        return max(now, *ready.values(), 1.0), float(waits)
    (before, waits_before), (after, waits_after) = marks[_WARM], marks[-1]
    return (after - before) / _RUNS, (waits_after - waits_before) / _RUNS


def predict(
    binary: Binary,
    device: Device,
    nest: Nest = ONCE,
    *,
    dynamic: int = 0,
    floor: float | None = None,
    flops: float = 0.0,
) -> Prediction:
    """What a kernel is estimated to reach on a device.

    Args:
        nest: how its loops turn.
        dynamic: bytes of shared memory that a launch adds.
        floor: bytes of the floor, of a warp for each turn of the hot loop. None: all that it asks for.
        flops: tensor FLOP of a warp for each turn, where its instructions do not say.
    """
    code = path(binary.function, nest)
    done = work(code)
    loop = hot_loop(binary.function, storing=nest.storing)
    warps = binary.threads // WARP
    programs = device.resident(warps, binary.registers, binary.shared + dynamic)
    held = programs * warps
    # Barriers and products of four warps keep the warps of a program in step; other programs go on meanwhile.
    in_step = any(x.name in ("BAR", "HGMMA", "SYNCS") or x.name.startswith("UTC") for x, _ in code)
    abreast = -(-warps // SCHEDULERS) if in_step else 1
    tensor = done.flops or flops
    of_tensor = bool(done.units.get("tensor") and tensor)
    # Tiles that are multiplied are read by many programs, and come from the second-level cache.
    latency = device.cache_latency if of_tensor else device.latency
    cycles = waits = 0.0
    for often, run in groupby(code, key=lambda x: x[1]):
        body = [x for x, _ in run]
        repeats = loop is not None and not nest.inside and body == [x for x, _ in code[: len(body)]]
        # What a loop inside reads is there from its last turn.
        here = _NEAR if often > 1 else latency
        more, more_waits = alone(body, device, latency=here, repeats=repeats, abreast=abreast)
        cycles, waits = cycles + often * more, waits + often * more_waits
    # Cycles that a multiprocessor needs at the rate that is the measure.
    ideal = tensor / device.tensor if of_tensor else (floor or done.moved) / device.copy_bytes
    needed = {name: done.pipes.get(name, 0.0) * WARP / rate for name, rate in device.lanes().items()}
    needed["shared"] = done.shared_bytes / SHARED_BYTES
    needed["cache"] = done.moved * device.multiprocessors / device.cache_bytes
    needed["latency"] = cycles / max(held, 1)
    if of_tensor:
        needed["tensor"] = tensor / (device.warp_tensor if done.single else device.tensor)
    else:
        needed["copy"] = ideal
    return Prediction(
        "tensor" if of_tensor else "copy",
        {name: min(1.0, ideal / cycles_needed) for name, cycles_needed in needed.items() if cycles_needed > 0},
        programs,
        held,
        held * done.loaded / max(waits, 1.0),
        cycles,
    )
