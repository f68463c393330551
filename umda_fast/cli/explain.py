"""`umda-fast explain`: where a model looked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import load_runs
from umda_fast.cli.options import Format, OwnData, PatchSize, RunDir, TrainedOn, out_option, split_option

EXAMPLE = "umda-fast explain runs/first --data slides/ --bag slide_7 --out maps"


def explain(
    *,
    run: RunDir,
    out: Annotated[Path, out_option("Where the files go.")],
    data: OwnData = None,
    split: Annotated[str | None, split_option("Only test, val, train or new.  [default: all]")] = None,
    bag: Annotated[list[str] | None, typer.Option("--bag", help="Only this bag; may be repeated.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Instances listed per bag and task.")] = 20,
    heatmaps: Annotated[bool, typer.Option("--heatmaps/--no-heatmaps", help="A PNG per bag and task.")] = True,
    geojson: Annotated[bool, typer.Option("--geojson/--no-geojson", help="A file per bag for QuPath.")] = True,
    pixel_size: Annotated[
        float | None,
        typer.Option("--pixel-size", metavar="UM", help="Micrometres per level-0 pixel, where the data lacks it."),
    ] = None,
    patch_size: PatchSize = None,
    format: Format = None,
    use: TrainedOn,
) -> None:
    """Write attention heatmaps, GeoJSON for QuPath and the instances with the most attention."""
    from umda_fast.cli.render import make_console
    from umda_fast.studies.maps import explain as explain_run

    result = explain_run(
        load_runs([run], use),
        source=data,
        out=out,
        split=split,
        bags=bag,
        top=top,
        heatmaps=heatmaps,
        geojson=geojson,
        pixel_size=pixel_size,
        patch_size=patch_size,
        format=format,
        **use.arguments(),
    )
    console = make_console()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    say(f"{out}: {result.bags} bags, {result.heatmaps} heatmaps, {result.geojson} GeoJSON files")
    unit = {"px": " pixels", "um": " micrometres"}.get(result.unit, "")
    if result.guessed:
        ends = " to ".join(f"{size:g}" for size in dict.fromkeys((result.guessed[0], result.guessed[-1])))
        say(f"patch size guessed from the distances between patches: {ends}{unit}; if they overlap, say --patch-size")
    for names, why in (
        (result.without, "no coordinates, so no map"),
        (result.unsized, "no two patches in a row, so no guess of their size and no map without --patch-size"),
    ):
        if names:
            say(f"{why}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""))
