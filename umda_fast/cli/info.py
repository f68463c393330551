"""`umda-fast info`: this machine and this installation."""

from __future__ import annotations

from umda_fast.cli.common import check_outputs, save_json
from umda_fast.cli.options import JsonFile

EXAMPLE = "umda-fast info"


def info(*, json: JsonFile = None) -> None:
    """Show versions, devices, and each backend: available, or why not."""
    from umda_fast.cli.render import collect_info, make_console, print_info

    check_outputs(json)
    report = collect_info()
    print_info(make_console(), report)
    save_json(json, "info", report)
