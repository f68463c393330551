"""`umda-fast pack`: a directory of bags rewritten once, so that every epoch reads it fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umda_fast.cli.common import source_options
from umda_fast.cli.options import Quiet, Set, SkipBad
from umda_fast.errors import DataError

EXAMPLE = "umda-fast pack slides/ slides_packed && umda-fast train --data slides_packed"


def pack(
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A directory of bags.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    set_: Set = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite a directory of bags into one file per view, labels and splits included. Started again after it was
    stopped, it goes on.

    `--set` takes the options labels, splits, views, mpp, match, tolerance and read_timeout of the source, as
    `--set data.options.mpp=0.25`.
    """
    from umda_fast.cli.render import make_console
    from umda_fast.data import pack_slides
    from umda_fast.runtime.progress import ProgressReport
    from umda_fast.train.data import tell_skipped

    options = source_options(set_, skip_bad)
    understood = ("labels", "splits", "views", "mpp", "match", "tolerance", "skip_bad", "read_timeout")
    for name in options:
        if name not in understood:
            raise DataError(f"data.options.{name}: expected one of {', '.join(understood)} to pack")
    with ProgressReport("pack", enabled=not quiet) as report:

        def progress(done: int, bags: int, instances: int) -> None:
            report.update(done / bags, instances=instances, note=f"bag {done}/{bags}")

        result = pack_slides(source, out, progress=progress, **options)
    tell_skipped(result.skipped)
    resumed = f", {result.resumed} of them from before" if result.resumed else ""
    make_console().print(
        f"{result.bags} bags{resumed}, {result.instances:,} instances, {result.bytes / 1e6:,.1f} MB in {out}",
        soft_wrap=True,
    )
