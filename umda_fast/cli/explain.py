"""`umda-fast explain`: where a model looked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.options import Format, OwnData, RunDir, TrainedOn, out_option, split_option

EXAMPLE = "umda-fast explain runs/first --data slides/ --bag slide_7 --out maps"


def explain(
    *,
    run: RunDir,
    out: Annotated[Path, out_option("Where the files go.")],
    data: OwnData = None,
    split: Annotated[str | None, split_option("Only this part of the data.")] = None,
    bag: Annotated[list[str] | None, typer.Option("--bag", help="Only this bag; may be repeated.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Instances listed per bag and task.")] = 20,
    heatmaps: Annotated[bool, typer.Option("--heatmaps/--no-heatmaps", help="A PNG per bag and task.")] = True,
    geojson: Annotated[bool, typer.Option("--geojson/--no-geojson", help="A file per bag for QuPath.")] = True,
    pixel_size: Annotated[
        float | None,
        typer.Option("--pixel-size", metavar="UM", help="Micrometres per level-0 pixel, where the data lacks it."),
    ] = None,
    format: Format = None,
    use: TrainedOn,
) -> None:
    """Write attention heatmaps, GeoJSON for QuPath and the instances with the most attention."""
    from umda_fast.cli.render import make_console
    from umda_fast.studies.maps import explain as explain_run
    from umda_fast.train import load_run

    result = explain_run(
        load_run(run),
        source=data,
        out=out,
        split=split,
        bags=bag,
        top=top,
        heatmaps=heatmaps,
        geojson=geojson,
        pixel_size=pixel_size,
        format=format,
        **use.arguments(),
    )
    console = make_console()
    console.print(
        f"{out}: {result.bags} bags, {result.heatmaps} heatmaps, {result.geojson} GeoJSON files", soft_wrap=True
    )
    if result.without:
        console.print(
            f"no coordinates, so no map: {', '.join(result.without[:5])}"
            + (f" and {len(result.without) - 5} more" if len(result.without) > 5 else ""),
            soft_wrap=True,
        )
