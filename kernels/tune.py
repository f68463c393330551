"""Measures the configurations of a kernel on this GPU and keeps the fastest. Nothing runs unless it is
asked for:

    python -m umda_fast.kernels.tune cross_view --dtype bfloat16 --views 3 --heads 4 --head-dim 64

Another configuration sums in another order: results are the same bits on one GPU between two calls of this,
not across one.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterable

import torch
import triton
from triton.errors import TritonError

from . import cross_view as _cross_view
from . import cross_view_tokens as _cross_view_tokens
from . import knn as _knn
from ._launch import Launch, run_all
from ._tuning import Config, trying, write

__all__ = ["Measure", "main", "tune", "tune_cross_view", "tune_cross_view_tokens", "tune_knn"]

Measure = Callable[[Callable[[], None]], float]


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


def tune_cross_view(
    dtype: torch.dtype,
    views: int,
    heads: int,
    head_dim: int,
    *,
    n: int = 1 << 18,
    device: torch.device,
    measure: Measure = _milliseconds,
) -> None:
    """Forward and backward of ``cross_view``, with every gradient."""
    q, k, v = _normal(n, views, 3, heads, head_dim, dtype=dtype, device=device).unbind(2)
    gate = _normal(n, views, heads, dtype=dtype, device=device)
    bias = _normal(heads, views, views, dtype=torch.float32, device=device)
    d_out = _normal(n, views, heads, head_dim, dtype=dtype, device=device)
    d_mass = _normal(n, views, views, dtype=torch.float32, device=device)
    d_entropy = _normal(n, views, heads, dtype=torch.float32, device=device)
    for backward in (False, True):
        key = _cross_view.key(dtype, views, head_dim, heads, backward)

        def plan(backward: bool = backward) -> list[Launch]:
            if backward:
                return _cross_view.plan_backward(d_out, d_mass, d_entropy, q, k, v, gate, bias, None)[0]
            return _cross_view.plan_forward(q, k, v, gate, bias, None)[0]

        tune(key, _cross_view.candidates(dtype, views, head_dim, heads), plan, device, measure)


def tune_cross_view_tokens(
    dtype: torch.dtype,
    views: int,
    heads: int,
    head_dim: int,
    *,
    length: int = 1024,
    instances: int = 16,
    device: torch.device,
    measure: Measure = _milliseconds,
) -> None:
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
        key = _cross_view_tokens.key(kernel, dtype, head_dim, tokens, segments)

        def plan(place: int = place) -> list[Launch]:
            if place == 0:
                return _cross_view_tokens.plan_forward(*shared, False)[0]
            launches = _cross_view_tokens.plan_backward(d_out, None, None, None, *shared, lse, lse)[0]
            # The keys' kernel reads what the queries' kernel writes, of which only the values matter.
            return launches[place - 1 : place]

        tune(key, _cross_view_tokens.candidates(kernel, dtype, head_dim), plan, device, measure)


def tune_knn(
    dtype: torch.dtype,
    width: int,
    k: int,
    metric: str,
    *,
    n: int = 20_000,
    device: torch.device,
    measure: Measure = _milliseconds,
) -> None:
    """The search of ``knn`` in one bag of ``n`` instances."""
    x = _normal(n, width, dtype=dtype, device=device)
    ptr = torch.tensor([0, n], device=device)
    tune(
        _knn.key(dtype, width, k, metric),
        _knn.candidates(dtype, width),
        lambda: _knn.plan(x, ptr, k, metric)[0],
        device,
        measure,
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="umda_fast.kernels.tune", description=__doc__)
    commands = parser.add_subparsers(dest="kernel", required=True)
    for name in ("cross_view", "cross_view_tokens", "knn"):
        command = commands.add_parser(name)
        command.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
        if name == "knn":
            command.add_argument("--width", type=int, default=64)
            command.add_argument("--k", type=int, default=8)
            command.add_argument("--metric", choices=["cosine", "euclidean"], default="cosine")
        else:
            command.add_argument("--views", type=int, default=3)
            command.add_argument("--heads", type=int, default=4)
            command.add_argument("--head-dim", type=int, default=64)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, options.dtype)
    if options.kernel == "knn":
        tune_knn(dtype, options.width, options.k, options.metric, device=device)
    elif options.kernel == "cross_view":
        tune_cross_view(dtype, options.views, options.heads, options.head_dim, device=device)
    else:
        tune_cross_view_tokens(dtype, options.views, options.heads, options.head_dim, device=device)


if __name__ == "__main__":
    main()
