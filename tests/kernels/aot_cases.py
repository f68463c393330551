"""What is compiled ahead of time: every kernel in its pinned configurations. ``python -m
tests.kernels.aot_cases`` writes ``budget.json``, the resources that ``test_compile.py`` holds them to."""

import functools
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from umda_fast.kernels import (
    cross_view,
    cross_view_tokens,
    dropout_add_norm,
    gelu_dropout,
    knn,
    projections,
    view_fusion,
)
from umda_fast.kernels._aot import Resources, compile_launch
from umda_fast.kernels._launch import Launch

ARCHITECTURES = (80, 90, 100)
BUDGET = Path(__file__).with_name("budget.json")

BF16, F32 = torch.bfloat16, torch.float32
meta = functools.partial(torch.empty, device="meta")


def cross_view_launches(dtype: torch.dtype, views: int, heads: int, head_dim: int) -> list[Launch]:
    """Forward, backward and the sum of d_bias, with bias, mask and all gradients: the most registers."""
    n = 1000
    q, k, v = meta(n, views, 3, heads, head_dim, dtype=dtype).unbind(2)
    shared = (
        q,
        k,
        v,
        meta(n, views, heads, dtype=dtype),
        meta(heads, views, views),
        meta(n, views, dtype=torch.bool),
    )
    gradients = meta(n, views, heads, head_dim, dtype=dtype), meta(n, views, views), meta(n, views, heads)
    forward, _ = cross_view.plan_forward(*shared)
    backward, _ = cross_view.plan_backward(*gradients, *shared)
    return forward + backward


def token_launches(dtype: torch.dtype, views: int, head_dim: int, mean_length: int) -> list[Launch]:
    """Forward, both backward kernels and the sum of d_bias, with bias and all gradients."""
    heads, segments, instances = 4, 96, 32
    tokens = segments * mean_length
    q, k, v = meta(tokens, 3, heads, head_dim, dtype=dtype).unbind(1)
    shared = (
        *(q, k, v, meta(tokens, heads, dtype=dtype)),
        *(meta(segments + 1, dtype=torch.int64), meta(instances + 1, dtype=torch.int64)),
        *(meta(segments, dtype=torch.int32), views, meta(heads, views, views)),
    )
    rows = meta(tokens, heads)
    gradients = meta(tokens, heads, head_dim, dtype=dtype), meta(tokens, views), rows, rows
    forward, _ = cross_view_tokens.plan_forward(*shared, True)
    backward, _ = cross_view_tokens.plan_backward(*gradients, *shared, rows, rows)
    return forward + backward


def knn_launches(dtype: torch.dtype, width: int, k: int, metric: str) -> list[Launch]:
    """The search, and the norms for the cosine."""
    return knn.plan(meta(1000, width, dtype=dtype), meta(11, dtype=torch.int64), k, metric)[0]


def view_fusion_launches(dtype: torch.dtype, views: int, width: int, narrow: int) -> list[Launch]:
    """Both forward kernels and the sum of what they leave, both backward ones, with mask and all gradients; of many
    views the first only, which holds the most registers and takes seconds to compile."""
    n = 1000
    shared = (
        meta(n, views, width, dtype=dtype),
        meta(n, views),
        meta(n, views, narrow, dtype=dtype),
        meta(n, views, dtype=torch.bool),
    )
    forward, outputs = view_fusion.plan_forward(*shared)
    if views > 8:
        return forward[:1]
    gradients = meta(n, width, dtype=dtype), meta(n, views), meta(views, width), meta(views, width), meta(())
    saved = outputs[2], outputs[7], outputs[4]
    backward, _ = view_fusion.plan_backward(*gradients, *shared, *saved)
    return forward + backward


def projection_launches(dtype: torch.dtype, width: int) -> list[Launch]:
    """The queries, keys, values and gates of a block, and the linear layer after attention, with dropout."""
    x = meta(1000, 3, width, dtype=dtype)

    def layer(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        return meta(columns, width, dtype=dtype), meta(columns, dtype=dtype)

    before, _ = projections.plan_norm_linear(x, meta(width), meta(width), *layer(3 * width), *layer(4), 1e-5)
    keep = meta(1000, 3, width, dtype=torch.bool)
    after, _ = projections.plan_linear_residual(x, *layer(width), x, keep, 1.1)
    return before + after


def gelu_dropout_launches(dtype: torch.dtype, width: int) -> list[Launch]:
    """Both passes with bias and dropout, and the sum of the bias's gradient."""
    x, bias, seed = meta(1000, width, dtype=dtype), meta(width), meta((), dtype=torch.int64)
    forward, _ = gelu_dropout.plan_forward(x, bias, seed, 6554)
    backward, _ = gelu_dropout.plan_backward(x, x, bias, seed, 6554)
    return forward + backward


def dropout_add_norm_launches(dtype: torch.dtype, stream: torch.dtype, width: int) -> list[Launch]:
    """Both passes with all vectors, dropout and layer norm, and the sums of the vectors' gradients."""
    x, residual, seed = meta(1000, width, dtype=dtype), meta(1000, width, dtype=stream), meta((), dtype=torch.int64)
    vectors = [meta(width) for _ in range(4)]
    forward, (total, normed, *moments) = dropout_add_norm.plan_forward(
        x, *vectors[:2], residual, *vectors[2:], seed, 6554, 1e-5
    )
    backward, _ = dropout_add_norm.plan_backward(
        total, normed, x, *vectors[:2], total, vectors[2], *moments, seed, 6554
    )
    return forward + backward


CASES: dict[str, Callable[[], list[Launch]]] = {
    **{
        f"cross_view {name} V={views} H={heads} Dh={head_dim}": functools.partial(
            cross_view_launches, dtype, views, heads, head_dim
        )
        for name, dtype, views, heads, head_dim in (
            ("bf16", BF16, 3, 4, 64),
            ("bf16", BF16, 3, 4, 8),
            ("bf16", BF16, 4, 4, 256),
            ("bf16", BF16, 16, 4, 256),
            ("f32", F32, 3, 4, 64),
            ("f32", F32, 5, 4, 64),
        )
    },
    **{
        f"cross_view_tokens {name} V={views} Dh={head_dim} mean length {length}": functools.partial(
            token_launches, dtype, views, head_dim, length
        )
        for name, dtype, views, head_dim, length in (
            ("bf16", BF16, 3, 64, 512),
            ("bf16", BF16, 3, 128, 512),
            ("bf16", BF16, 16, 256, 512),
            ("bf16", BF16, 3, 64, 8),
            ("f32", F32, 16, 256, 512),
        )
    },
    **{
        f"knn {name} d={width} k={k} {metric}": functools.partial(knn_launches, dtype, width, k, metric)
        for name, dtype, width, k, metric in (
            ("bf16", BF16, 256, 64, "cosine"),
            ("f32", F32, 64, 8, "cosine"),
            ("f32", F32, 2, 8, "euclidean"),
            ("f32", F32, 64, 64, "euclidean"),
        )
    },
    **{
        f"projections {name} D={width}": functools.partial(projection_launches, dtype, width)
        for name, dtype, width in (("bf16", BF16, 256), ("bf16", BF16, 1024), ("bf16", BF16, 97), ("f32", F32, 128))
    },
    **{
        f"gelu_dropout {name} D={width}": functools.partial(gelu_dropout_launches, dtype, width)
        for name, dtype, width in (("bf16", BF16, 512), ("bf16", BF16, 97), ("f32", F32, 512), ("f32", F32, 40))
    },
    **{
        f"dropout_add_norm {name} D={width}": functools.partial(dropout_add_norm_launches, dtype, stream, width)
        for name, dtype, stream, width in (
            ("bf16", BF16, BF16, 256),
            ("bf16 on f32", BF16, F32, 256),
            ("bf16", BF16, BF16, 97),
            ("f32", F32, F32, 256),
            ("f32", F32, F32, 4096),
        )
    },
    **{
        f"view_fusion {name} V={views} D={width} P={narrow}": functools.partial(
            view_fusion_launches, dtype, views, width, narrow
        )
        for name, dtype, views, width, narrow in (
            ("bf16", BF16, 3, 256, 128),
            ("bf16", BF16, 16, 512, 256),
            ("f32", F32, 4, 1024, 64),
        )
    },
}


def compile_case(case: str, architecture: int) -> dict[str, Resources]:
    """Resources of every kernel of a case."""
    return {launch.kernel.__name__: compile_launch(launch, architecture) for launch in CASES[case]()}


def _own_cache(folder: str) -> None:
    """Compiles anew, whatever earlier runs left behind: the seconds are part of what is checked."""
    os.environ["TRITON_CACHE_DIR"] = folder
    os.environ["OMP_NUM_THREADS"] = "1"


def compile_all() -> dict[tuple[str, int], dict[str, Resources]]:
    """Every case for every architecture, in two processes."""
    keys = [(case, architecture) for architecture in ARCHITECTURES for case in CASES]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(2, get_context("spawn"), _own_cache, (folder,)) as pool,
    ):
        return dict(zip(keys, pool.map(compile_case, *zip(*keys, strict=True)), strict=True))


def main() -> None:
    """Writes the resources of every kernel as the budget."""
    budget: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (case, architecture), kernels in compile_all().items():
        for kernel, resources in kernels.items():
            budget.setdefault(case, {}).setdefault(kernel, {})[f"sm_{architecture}"] = resources.as_dict()
    BUDGET.write_text(json.dumps({"triton": triton.__version__, "cases": budget}, indent=1) + "\n")


if __name__ == "__main__":
    main()
