"""The emulation itself: that it computes what CUDA would, and that it sees what is wrong."""

import ctypes

import pytest
import torch

from tests.cuda_host import _host
from tests.cuda_host._host import Arena, EmulationError, library, pointer

WRONG = {
    "half a barrier": (0, "not all threads reached __syncthreads"),
    "two barriers": (1, "divergent barrier"),
    "half a warp": (2, "not all threads reached __shfl_sync"),
    "outside static shared memory": (3, "written outside shared memory"),
    "outside dynamic shared memory": (4, "written outside shared memory"),
    "misaligned": (5, "misaligned access"),
    "shared memory read as global": (6, "__ldg of shared memory"),
}
RACE, UNINITIALISED = 7, 8


def _wrong(which: int, arena: Arena, order: int = 0) -> torch.Tensor:
    to = arena.empty(128, dtype=torch.float32)
    library().emulation_set_order(ctypes.c_uint(order))
    library().probe_wrong(ctypes.c_int(which), ctypes.c_void_p(pointer(to)))
    library().emulation_set_order(ctypes.c_uint(0))
    arena.check()
    return to


@pytest.mark.parametrize("name", WRONG)
def test_finds_what_is_wrong(name: str) -> None:
    which, message = WRONG[name]
    with pytest.raises(EmulationError, match=message):
        _wrong(which, Arena())
    # And it is over with: the next launch is a good one.
    test_sum(1)


def test_a_race_shows_in_the_order() -> None:
    results = [_wrong(RACE, Arena(), order) for order in (0, 1)]
    assert not torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))


def test_shared_memory_is_poisoned_in_every_block() -> None:
    assert _wrong(UNINITIALISED, Arena())[0].isnan()


def test_a_write_outside_a_buffer_is_found() -> None:
    arena = Arena()
    to = arena.empty(5, dtype=torch.float32)
    to.as_strided((1,), (1,), to.storage_offset() + 5).fill_(1.0)
    with pytest.raises(EmulationError, match="outside a buffer"):
        arena.check()


@pytest.mark.parametrize("max_blocks", [1, 2, 100])
def test_sum(max_blocks: int) -> None:
    arena = Arena()
    x = arena.put(torch.arange(1000, dtype=torch.float32))
    blocks = min(max_blocks, 8)
    to = arena.empty(blocks, dtype=torch.float32)
    library().probe_sum(
        ctypes.c_void_p(pointer(x)),
        ctypes.c_void_p(pointer(to)),
        ctypes.c_int64(1000),
        ctypes.c_int(max_blocks),
    )
    arena.check()
    assert float(to.sum()) == 999 * 500


def test_shuffles() -> None:
    arena = Arena()
    x = arena.put(torch.arange(100, 132, dtype=torch.int32))
    to = arena.empty(6, 32, dtype=torch.int32)
    library().probe_shuffles(ctypes.c_void_p(pointer(x)), ctypes.c_void_p(pointer(to)))
    arena.check()
    lane = torch.arange(32)
    sources = [(lane + 5) % 32, lane ^ 3]
    sources += [
        torch.where(lane < 2, lane, lane - 2),
        torch.where(lane >= 25, lane, lane + 7),
        lane // 8 * 8 + 1,
    ]
    for row, source in zip(to, sources, strict=False):
        assert torch.equal(row, x[source])
    bits = sum(1 << i for i in range(32) if (100 + i) % 3 == 0)
    assert all(int(b) & 0xFFFFFFFF == bits for b in to[5])


def test_conversions_are_those_of_torch() -> None:
    arena = Arena()
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=generator, dtype=torch.int64)
    values = values.to(torch.int32).view(torch.float32)
    smaller = torch.randn(20000, generator=generator) * torch.logspace(-9, 5, 20000)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.996, 65520.0, 2**-24, 2**-25, 2**-14])
    x = torch.cat([values, smaller, special])
    source = arena.put(x)
    to = arena.empty(2, len(x), dtype=torch.int16)
    back = arena.empty(2, len(x), dtype=torch.float32)
    library().probe_convert(*(ctypes.c_void_p(pointer(t)) for t in (source, to, back)), ctypes.c_int(len(x)))
    arena.check()
    for row, again, dtype in zip(to, back, (torch.bfloat16, torch.float16), strict=True):
        assert torch.equal(row.view(dtype).float().nan_to_num(7), x.to(dtype).float().nan_to_num(7))
        assert torch.equal(again.nan_to_num(7), x.to(dtype).float().nan_to_num(7))


def test_repeatable_tells_results_apart() -> None:
    with pytest.raises(AssertionError, match="depends on the grid"):
        _host.repeatable(lambda max_blocks, order: [torch.tensor([float(max_blocks)])])
