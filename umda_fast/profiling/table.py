"""The step as a table: what every block and every operation costs, beside the least that its bytes allow.

The floor of a row is its bytes over the rate at which this machine copies, measured in the same run; its share of the
floor is floor over time, 1 where nothing but memory is waited for. More than 1 is what a cache saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from umda_fast.blocks import Place
from umda_fast.profiling.timing import Time
from umda_fast.profiling.traffic import Count

__all__ = ["ONCE", "STEP", "copy_rate", "step_table"]

STEP = "step"
"""The block around all others but the first draw of data; what no other has is the rest."""

ONCE = ("data", "SGL", "gradients", "optimiser", STEP)
"""Blocks that are no part of the model: they have no backward pass of their own."""

Key = tuple[Place, str]


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy of 200 MB, reads and writes together: the best of 8."""
    source = torch.ones(50_000_000, device=device)
    target = torch.ones_like(source)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = float("inf")
    for _ in range(8):
        wait()
        begin = time.perf_counter()
        target.copy_(source)
        wait()
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best


def step_table(
    counts: Mapping[Key, Count],
    spent: Mapping[Key, Time],
    *,
    timed_steps: int,
    counted_steps: int,
    scale: float,
    seconds: float,
    copy_rate: float,
    on_device: bool,
) -> dict[str, Any]:
    """Rows of one step, in the order in which they were first met, with totals.

    Args:
        counts, spent: by place and operation, of all steps together.
        timed_steps, counted_steps: how many those were.
        scale: instances in a timed step over those in a counted one; bytes are taken to be in proportion.
        seconds: of all timed steps on the clock.
        copy_rate: bytes per second.
        on_device: whether the time that counts is the kernels'.
    """

    def row(sum_of: Callable[[Key], bool]) -> dict[str, Any]:
        host = sum(value.host for key, value in spent.items() if sum_of(key)) / timed_steps
        device = sum(value.device for key, value in spent.items() if sum_of(key)) / timed_steps
        calls = sum(value.calls for key, value in counts.items() if sum_of(key)) / counted_steps
        moved = sum(value.bytes for key, value in counts.items() if sum_of(key)) / counted_steps * scale
        floor, taken = moved / copy_rate, device if on_device else host
        return {
            "calls": calls,
            "bytes": moved,
            "host_seconds": host,
            "device_seconds": device if on_device else None,
            "floor_seconds": floor,
            "share": floor / taken if taken > 0 else None,
        }

    def rows(name: Callable[[Key], Hashable]) -> dict[Any, dict[str, Any]]:
        wanted = dict.fromkeys(name(key) for key in (*spent, *counts))
        return {one: row(lambda key, one=one: name(key) == one) for one in wanted}  # type: ignore[misc]

    blocks = [
        {"block": "rest" if place.block == STEP else place.block, "pass": _direction(place), **figures}
        for place, figures in rows(lambda key: _merged(key[0])).items()
    ]
    operations = [
        {"operation": name or "between operations", **figures} for name, figures in rows(lambda key: key[1]).items()
    ]
    operations.sort(key=lambda one: -(one["device_seconds"] or one["host_seconds"]))
    return {
        "seconds_per_step": seconds / timed_steps,
        "copy_bytes_per_second": copy_rate,
        "blocks": blocks,
        "operations": operations,
        "total": row(lambda key: True),
    }


def _merged(place: Place) -> Place:
    return Place(place.block, False) if place.block in ONCE else place


def _direction(place: Place) -> str:
    if place.block in ONCE:
        return "-"
    return "backward" if place.backward else "forward"
