"""The reader and the model on machine code that is written down here, where everything can be counted by hand."""

import pytest

from tests.machine_code.binary import Binary
from tests.machine_code.compare import compare, judge
from tests.machine_code.cost import Nest, alone, hot_loop, path, predict, work
from tests.machine_code.devices import DEVICES
from tests.machine_code.sass import Function, functions_of

H200 = DEVICES[90]


def assembled(*lines: str, name: str = "kernel") -> Function:
    """A kernel of these lines; ``label:`` alone names the place behind it."""
    text, address = [f".text.{name}:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(f".L_{line}")
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return functions_of("\n".join(text))[name]


def binary(function: Function, registers: int = 32, shared: int = 0, threads: int = 128) -> Binary:
    return Binary(function, registers, 0, shared, 0, threads)


def copying(loads: int, arithmetic: int = 0) -> Function:
    """A loop that loads 16 bytes a lane some times, calculates with the first and stores them."""
    return assembled(
        "loop:",
        *(f"LDG.E.128 R{8 + 4 * i}, desc[UR4][R2.64]" for i in range(loads)),
        *("FFMA R8, R8, R8, R8" for _ in range(arithmetic)),
        *(f"STG.E.128 desc[UR4][R4.64], R{8 + 4 * i}" for i in range(loads)),
        "@P0 BRA `(.L_loop)",
        "EXIT",
    )


NESTED = assembled(
    "S2R R0, SR_TID.X",
    "outer:",
    "IADD3 R1, R1, 0x1, RZ",
    "inner:",
    "LDG.E.64 R8, desc[UR4][R2.64]",
    "@P1 BRA `(.L_inner)",
    "other:",
    "FADD R9, R9, R8",
    "@P2 BRA `(.L_other)",
    "@P0 BRA `(.L_outer)",
    "EXIT",
)


def test_the_hot_loop_is_the_one_that_moves() -> None:
    loop = hot_loop(NESTED)
    assert loop is not None
    assert [NESTED.code[place].name for place in sorted(loop.body)] == ["LDG", "BRA"]


def test_code_around_a_loop_counts_as_often_as_it_runs() -> None:
    alone_ = work(path(NESTED))
    assert (alone_.slots, alone_.loaded) == (2, 32 * 8)
    once = work(path(NESTED, Nest((4,), beside=0)))
    assert once.slots == pytest.approx(2 + 2 / 4)  # the addition and the jump back
    beside = work(path(NESTED, Nest((4,), beside=3)))
    assert beside.units["float"] == pytest.approx(3 / 4)
    whole = work(path(NESTED, Nest((4, 2), beside=0)))
    assert whole.slots == pytest.approx(2 + 2 / 4 + 2 / 8)  # and the first and the last instruction


def test_loops_inside_the_hot_one_count_as_told() -> None:
    storing = assembled(
        "outer:",
        "MOV R9, RZ",
        "inner:",
        "FADD R9, R9, R8",
        "@P2 BRA `(.L_inner)",
        "STG.E.64 desc[UR4][R2.64], R8",
        "@P0 BRA `(.L_outer)",
        "EXIT",
    )
    assert work(path(storing, Nest(storing=True))).slots == 5
    assert work(path(storing, Nest(inside=(8,), storing=True))).slots == 2 * 8 + 3


def test_a_kernel_without_loops_is_its_path() -> None:
    straight = assembled("LDG.E R8, desc[UR4][R2.64]", "STG.E desc[UR4][R4.64], R8", "EXIT", "BRA `(.L_x)", "x:")
    assert work(path(straight)).slots == 3


def test_independent_loads_overlap_and_dependent_ones_do_not() -> None:
    independent = assembled("LDG.E R8, desc[UR4][R2.64]", "LDG.E R9, desc[UR4][R4.64]", "FADD R10, R8, R9")
    dependent = assembled("LDG.E R2, desc[UR4][R2.64]", "LDG.E R9, desc[UR4][R2.64]", "FADD R10, R9, R9")
    cycles, waits = alone(independent.code, H200, latency=700, repeats=False)
    assert waits == 1
    assert 700 < cycles < 750
    cycles, waits = alone(dependent.code, H200, latency=700, repeats=False)
    assert waits == 2
    assert 1400 < cycles < 1450


def test_loads_that_run_ahead_are_waited_for_less_often() -> None:
    """With asynchronous copies three turns ahead a turn takes a third of a latency."""

    def loop(ahead: int) -> Function:
        return assembled(
            "loop:",
            "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]",
            "LDGDEPBAR",
            f"DEPBAR.LE SB0, {ahead:#x}",
            "@P0 BRA `(.L_loop)",
        )

    at_once, _ = alone(loop(0).code, H200, latency=700, repeats=True)
    ahead, waits = alone(loop(2).code, H200, latency=700, repeats=True)
    assert at_once == pytest.approx(700, abs=10)
    assert ahead == pytest.approx(700 / 3, rel=0.15)
    assert waits == pytest.approx(1 / 3, abs=0.1)


def test_a_copy_is_limited_by_nothing_and_a_single_warp_by_its_latency() -> None:
    full = predict(binary(copying(4)), H200)
    assert (full.share, full.bound, full.warps) == (1.0, "copy", 64)
    assert full.in_flight == 64 * 4 * 512
    few = predict(binary(copying(1), registers=255, threads=32), H200)
    assert few.warps == 8
    assert few.bound == "latency"
    # A turn moves 1024 bytes in the latency and a few cycles, eight times side by side.
    assert few.share == pytest.approx(8 * 1024 / (H200.latency * H200.copy_bytes), rel=0.05)


def test_arithmetic_limits_by_issue_slots() -> None:
    found = predict(binary(copying(1, arithmetic=1000)), H200)
    assert found.bound in ("issue", "fma")
    assert found.bounds["issue"] == pytest.approx(1024 / H200.copy_bytes * 4 / 1003, rel=0.01)
    # A100 has half the lanes: there it is the multipliers.
    assert predict(binary(copying(1, arithmetic=1000)), DEVICES[80]).bound == "fma"


def test_the_floor_is_the_measure_where_it_is_given() -> None:
    code = copying(1, arithmetic=1000)
    asked, floor = predict(binary(code), H200), predict(binary(code), H200, floor=512)
    assert floor.share == pytest.approx(asked.share / 2)


def test_products_of_one_warp_are_counted_by_their_shape() -> None:
    code = assembled("loop:", "HMMA.16816.F32.BF16 R8, R4, R2, R8", "@P0 BRA `(.L_loop)", "EXIT")
    assert work(path(code)).flops == 2 * 16 * 8 * 16
    assert predict(binary(code), DEVICES[80]).of == "tensor"
    four = assembled("loop:", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "@P0 BRA `(.L_loop)", "EXIT")
    assert work(path(four)).flops == 2 * 64 * 128 * 16 / 4


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "programs"),
    [(32, 0, 128, 16), (128, 0, 128, 4), (33, 0, 1024, 1), (32, 100_000, 128, 2), (16, 0, 32, 32)],
)
def test_resident_programs(registers: int, shared: int, threads: int, programs: int) -> None:
    assert H200.resident(threads // 32, registers, shared) == programs


def judged(before: Function, after: Function) -> str:
    return judge(("case", "kernel", 90), binary(before), binary(after)).verdict


def test_verdicts() -> None:
    code = copying(2, arithmetic=200)
    assert judged(code, copying(2, arithmetic=200)) == "identical"
    swapped = assembled(
        "loop:",
        "LDG.E.128 R12, desc[UR4][R2.64]",
        "LDG.E.128 R8, desc[UR4][R2.64]",
        *("FFMA R8, R8, R8, R8" for _ in range(200)),
        "STG.E.128 desc[UR4][R4.64], R8",
        "STG.E.128 desc[UR4][R4.64], R12",
        "@P0 BRA `(.L_loop)",
        "EXIT",
    )
    assert judged(code, swapped) == "reordered"
    assert judged(code, copying(2, arithmetic=201)) == "noise"
    assert judged(code, copying(2, arithmetic=400)) == "real"
    assert judged(code, copying(1, arithmetic=200)) == "real"
    found = judge(("case", "kernel", 90), binary(code), binary(code, registers=64))
    assert found.verdict == "real"
    assert "registers 32 -> 64" in found.changes


def test_labels_and_names_are_not_code() -> None:
    one = assembled("loop:", "FADD R1, R1, R1", "@P0 BRA `(.L_loop)", "EXIT", name="one")
    two = assembled("turn:", "FADD R1, R1, R1", "@P0 BRA `(.L_turn)", "EXIT", name="two")
    assert judged(one, two) == "identical"


def test_kernels_of_one_tree_only() -> None:
    code, other = binary(copying(2)), binary(copying(1))
    before = {("case", "old", 90): code, ("case", "gone", 90): other}
    after = {("case", "new", 90): code, ("case", "more", 90): binary(copying(3))}
    found = {x.name[1]: x for x in compare(before, after)}
    assert {name: x.verdict for name, x in found.items()} == {"new": "identical", "more": "added", "gone": "removed"}
    assert found["new"].changes == ("was case: old",)
