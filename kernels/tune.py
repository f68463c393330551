"""Measures the configurations of a kernel on this GPU and keeps the fastest. Nothing runs unless it is
asked for:

    umda-fast tune cross_view --dtype bfloat16 --views 3 --heads 4 --head-dim 64

(or ``python -m umda_fast.kernels.tune`` with the same words). Another configuration sums in another order:
results are the same bits on one GPU between two calls of this, not across one.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import triton
from triton.errors import TritonError

from umda_fast.errors import DataError

from . import cross_view as _cross_view
from . import cross_view_tokens as _cross_view_tokens
from . import knn as _knn
from ._launch import Launch, run_all
from ._tuning import Config, measured, pinned_configurations, trying, tuning_file, write

__all__ = [
    "KERNELS",
    "Listed",
    "Measure",
    "Shape",
    "Tunable",
    "command",
    "cross_view",
    "cross_view_tokens",
    "describe",
    "knn",
    "listing",
    "main",
    "select",
    "tune",
    "tune_all",
]

KERNELS = ("cross_view", "cross_view_tokens", "knn")

Measure = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Shape:
    """What kernels are tuned for: features of a head are those of attention; width, k and metric those of knn."""

    dtype: str = "bfloat16"
    views: int = 3
    heads: int = 4
    head_dim: int = 64
    width: int = 64
    k: int = 8
    metric: str = "cosine"


@dataclass(frozen=True)
class Tunable:
    """One kernel at one shape: what its configuration is kept for, the choices, the launches to measure."""

    key: str
    candidates: list[Config]
    plan: Callable[[], list[Launch]]


@dataclass(frozen=True)
class Listed:
    """What is known about one key."""

    key: str
    pinned: Config
    candidates: int  #: that tuning would measure
    measured: dict[str, Config]  #: by GPU and Triton


def _milliseconds(run: Callable[[], None]) -> float:
    """Median over repeated runs, caches flushed in between."""
    return float(triton.testing.do_bench(run, return_mode="median"))


def tune(
    key: str,
    candidates: Iterable[Config],
    plan: Callable[[], list[Launch]],
    device: torch.device,
    measure: Measure = _milliseconds,
) -> dict[float, Config]:
    """Measures ``plan``'s launches under every candidate for ``key`` and keeps the fastest.

    Returns:
        Candidates by their time; those that do not compile or fit on the GPU are left out.

    Raises:
        RuntimeError: no candidate runs.
    """
    times: dict[float, Config] = {}
    for candidate in candidates:
        with trying(key, candidate):
            try:
                times[measure(functools.partial(run_all, plan(), device))] = candidate
            except TritonError:
                continue
    if not times:
        raise RuntimeError(f"no configuration of {key} runs on {device}")
    write(device, key, times[min(times)])
    return times


def _normal(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Never zeros: some GPUs run faster on them than on data.
    return torch.randn(shape, device=device).to(dtype)


def cross_view(
    dtype: torch.dtype, views: int, heads: int, head_dim: int, *, n: int = 1 << 18, device: torch.device
) -> Iterator[Tunable]:
    """Forward and backward of ``cross_view``, with every gradient."""
    q, k, v = _normal(n, views, 3, heads, head_dim, dtype=dtype, device=device).unbind(2)
    gate = _normal(n, views, heads, dtype=dtype, device=device)
    bias = _normal(heads, views, views, dtype=torch.float32, device=device)
    d_out = _normal(n, views, heads, head_dim, dtype=dtype, device=device)
    d_mass = _normal(n, views, views, dtype=torch.float32, device=device)
    d_entropy = _normal(n, views, heads, dtype=torch.float32, device=device)
    candidates = _cross_view.candidates(dtype, views, head_dim, heads)

    def forward() -> list[Launch]:
        return _cross_view.plan_forward(q, k, v, gate, bias, None)[0]

    def backward() -> list[Launch]:
        return _cross_view.plan_backward(d_out, d_mass, d_entropy, q, k, v, gate, bias, None)[0]

    yield Tunable(_cross_view.key(dtype, views, head_dim, heads, False), candidates, forward)
    yield Tunable(_cross_view.key(dtype, views, head_dim, heads, True), candidates, backward)


def cross_view_tokens(
    dtype: torch.dtype,
    views: int,
    heads: int,
    head_dim: int,
    *,
    length: int = 1024,
    instances: int = 16,
    device: torch.device,
) -> Iterator[Tunable]:
    """The three large kernels of ``cross_view_tokens`` on segments of ``length`` tokens."""
    segments = views * instances
    tokens = segments * length
    q, k, v = _normal(tokens, 3, heads, head_dim, dtype=dtype, device=device).unbind(1)
    gate = _normal(tokens, heads, dtype=dtype, device=device)
    cu_tokens = torch.arange(segments + 1, device=device) * length
    cu_segments = torch.arange(instances + 1, device=device) * views
    view = (torch.arange(segments, device=device) % views).to(torch.int32)
    shared = (q, k, v, gate, cu_tokens, cu_segments, view, views, None)
    d_out = _normal(tokens, heads, head_dim, dtype=dtype, device=device)
    lse = torch.full((tokens, heads), math.log(length * views), device=device)
    for place, kernel in enumerate(("forward", "queries", "keys")):

        def plan(place: int = place) -> list[Launch]:
            if place == 0:
                return _cross_view_tokens.plan_forward(*shared, False)[0]
            launches = _cross_view_tokens.plan_backward(d_out, None, None, None, *shared, lse, lse)[0]
            # The keys' kernel reads what the queries' kernel writes, of which only the values matter.
            return launches[place - 1 : place]

        key = _cross_view_tokens.key(kernel, dtype, head_dim, tokens, segments)
        yield Tunable(key, _cross_view_tokens.candidates(kernel, dtype, head_dim), plan)


def knn(
    dtype: torch.dtype, width: int, k: int, metric: str, *, n: int = 20_000, device: torch.device
) -> Iterator[Tunable]:
    """The search of ``knn`` in one bag of ``n`` instances."""
    x = _normal(n, width, dtype=dtype, device=device)
    ptr = torch.arange(2, device=device) * n
    yield Tunable(
        _knn.key(dtype, width, k, metric), _knn.candidates(dtype, width), lambda: _knn.plan(x, ptr, k, metric)[0]
    )


def tune_all(
    tunables: Iterable[Tunable],
    device: torch.device,
    measure: Measure = _milliseconds,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """``tune`` of each, one line about each.

    Raises:
        RuntimeError: no candidate of one of them runs.
    """
    for tunable in tunables:
        times = tune(tunable.key, tunable.candidates, tunable.plan, device, measure)
        best = min(times)
        tell(f"{tunable.key}: {best:.4g} ms, {describe(times[best])}; slowest of {len(times)} {max(times):.4g} ms")


def listing(tunables: Iterable[Tunable]) -> list[Listed]:
    """What is pinned, what was measured, how much there is to measure; tunables on ``meta`` run nothing."""
    kept = measured()
    rows = []
    for tunable in tunables:
        with pinned_configurations() as pinned:
            tunable.plan()
        found = {machine: table[tunable.key] for machine, table in kept.items() if tunable.key in table}
        rows.append(Listed(tunable.key, pinned[tunable.key], len(tunable.candidates), found))
    return rows


def describe(config: Config) -> str:
    """``BN=4 BD=64, 4 warps``."""
    tile = " ".join(f"{name}={size}" for name, size in sorted(config.tile.items()))
    most = "" if config.max_registers is None else f", at most {config.max_registers} registers"
    return f"{tile}, {config.num_warps} warps{most}"


def select(kernels: Sequence[str], shape: Shape, device: torch.device) -> Iterator[Tunable]:
    """The tunables of ``kernels``, out of `KERNELS`, at one shape; on ``meta`` they can only be listed."""
    dtype = getattr(torch, shape.dtype)
    for kernel in kernels:
        if kernel == "knn":
            yield from knn(dtype, shape.width, shape.k, shape.metric, device=device)
        elif kernel == "cross_view":
            yield from cross_view(dtype, shape.views, shape.heads, shape.head_dim, device=device)
        else:
            yield from cross_view_tokens(dtype, shape.views, shape.heads, shape.head_dim, device=device)


def command(
    kernels: Sequence[str], shape: Shape, *, dry_run: bool = False, say: Callable[[str], None] = print
) -> None:
    """Tunes ``kernels`` (none: all of `KERNELS`) at one shape, or with ``dry_run`` lists what is known about them.

    Raises:
        DataError: an argument that is none of the choices, or no GPU to measure on.
    """
    for name, value, choices in (
        ("--dtype", shape.dtype, ("bfloat16", "float16", "float32")),
        ("--metric", shape.metric, ("cosine", "euclidean")),
        *(("KERNEL", kernel, KERNELS) for kernel in kernels),
    ):
        if value not in choices:
            raise DataError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
    if not dry_run and not torch.cuda.is_available():
        raise DataError("tune: torch finds no CUDA device, and tuning measures on one; --dry-run lists what there is")
    device = torch.device("meta") if dry_run else torch.device("cuda", torch.cuda.current_device())
    tunables = select(kernels or KERNELS, shape, device)
    if dry_run:
        for row in listing(tunables):
            say(f"{row.key}: pinned {describe(row.pinned)}; {row.candidates} candidates")
            for machine, config in row.measured.items():
                say(f"    measured on {machine}: {describe(config)}")
    else:
        tune_all(tunables, device, tell=say)
    say(f"kept in {tuning_file()}")


def main(arguments: list[str] | None = None) -> None:
    """The command line above, where the package's own is not installed."""
    parser = argparse.ArgumentParser(prog="python -m umda_fast.kernels.tune", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)}; default: all")
    for option in fields(Shape):
        name, kind = option.name.replace("_", "-"), type(option.default)
        parser.add_argument(f"--{name}", type=kind, default=option.default, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="list, measure nothing, need no GPU")
    try:
        given = vars(parser.parse_args(arguments))
        command(given.pop("kernels"), dry_run=given.pop("dry_run"), shape=Shape(**given))
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
