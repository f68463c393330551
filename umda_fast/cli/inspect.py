"""`umda-fast inspect`: what a source of bags holds."""

from __future__ import annotations

from typing import Annotated

import typer

from umda_fast.cli.common import check_outputs, save_json, source_options
from umda_fast.cli.options import Format, JsonFile, Set, SkipBad

EXAMPLE = "umda-fast inspect slides/"


def inspect(
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="digits, a directory of bags, or an .npz file.")],
    format: Format = None,
    set_: Set = None,
    skip_bad: SkipBad = False,
    json: JsonFile = None,
) -> None:
    """Say what the data holds: bags, instances, views, tasks, what is missing, what each column of the table of labels
    was taken for, how `data.standardize=auto` scales the features, and the first problem by name. The exit code is 2
    for a problem that a training does not go on with.
    """
    from dataclasses import asdict

    from umda_fast.cli.render import make_console, print_inspection
    from umda_fast.data import find_format, inspect_splits, load_source
    from umda_fast.train.scaling import view_scalings

    check_outputs(json)
    splits = load_source(source, format=format, **source_options(set_, skip_bad))
    report = inspect_splits(splits, source, find_format(source, format).name)
    scaling = [str(view) for view in view_scalings(splits["train"])]
    print_inspection(make_console(), report, scaling)
    save_json(json, "inspect", {**asdict(report), "scaling": scaling})
    if report.faults:
        raise typer.Exit(2)
