"""`umda-fast tune`: the fastest configurations of the Triton kernels on this GPU."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLE = "umda-fast tune cross_view --dtype bfloat16 --views 3 --heads 4 --head-dim 64"


def tune(
    *,
    kernels: Annotated[
        list[str] | None, typer.Argument(metavar="KERNEL...", help="cross_view, cross_view_tokens, knn; all if none.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    views: Annotated[int, typer.Option("--views", min=1, help="Views.")] = 3,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Heads.")] = 4,
    head_dim: Annotated[int, typer.Option("--head-dim", min=8, max=256, help="Features of a head.")] = 64,
    width: Annotated[int, typer.Option("--width", min=1, help="Features of knn.")] = 64,
    k: Annotated[int, typer.Option("--k", min=1, max=64, help="Neighbours of knn.")] = 8,
    metric: Annotated[str, typer.Option("--metric", help="cosine or euclidean, of knn.")] = "cosine",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what is pinned, what was measured and where that is kept.")
    ] = False,
) -> None:
    """Measure the configurations of the Triton kernels on this GPU and keep the fastest, for every length.

    Without this, pinned configurations are used. What is kept is read by later processes; set UMDA_FAST_TUNING to
    keep it in another file.
    """
    from umda_fast.cli.render import make_console
    from umda_fast.errors import DataError
    from umda_fast.ops import backend_status

    if backend_status()["triton"] == "triton is not installed":
        raise DataError("tune: triton is not installed")
    from umda_fast.kernels.tune import Shape, command

    console = make_console()
    command(
        kernels or (),
        Shape(dtype, views, heads, head_dim, width, k, metric),
        dry_run=dry_run,
        say=lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False),
    )
