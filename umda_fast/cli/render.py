"""What the commands print: rich tables from plain results."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from umda_fast.tasks.metric_names import metric_name

__all__ = [
    "collect_info",
    "comparison_table",
    "crossval_table",
    "make_console",
    "metrics_table",
    "parity_table",
    "print_info",
    "print_inspection",
    "print_profile",
    "search_table",
    "shots_table",
]


def make_console() -> Console:
    """For results, on standard output. Where that is no terminal nothing is cut or wrapped at 80 columns: the
    output goes to a file or to another program."""
    return Console() if sys.stdout.isatty() else Console(width=160, highlight=False)


def _cell(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _spread(figures: Mapping[str, float | None]) -> str:
    return _cell(figures["mean"]) if figures["std"] is None else f"{_cell(figures['mean'])} ± {figures['std']:.4f}"


def metrics_table(
    results: Mapping[str, Mapping[str, Mapping[str, float | None]]], *, title: str, mark_best: bool = False
) -> Table:
    """A table of `{column: {task: {metric: value}}}`, the best of each row in bold if `mark_best`."""
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for column in results:
        table.add_column(column or "value", justify="right")
    first = next(iter(results.values()))
    for task, metrics in first.items():
        for index, metric in enumerate(metrics):
            values = [results[column].get(task, {}).get(metric) for column in results]
            cells = [_cell(value) for value in values]
            finite = [value for value in values if value is not None and math.isfinite(value)]
            if mark_best and finite:
                best = min(finite) if metric_name(metric).lower_is_better else max(finite)
                cells = [
                    f"[bold]{cell}[/bold]" if value == best else cell
                    for cell, value in zip(cells, values, strict=True)
                ]
            last = index == len(metrics) - 1
            table.add_row(task if index == 0 else "", metric_name(metric).title, *cells, end_section=last)
    return table


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Mean and standard deviation over the runs, a line for each model."""
    def cell(value: Mapping[str, Any], digits: int = 4) -> str:
        if value["mean"] is None:
            return "-"
        return f"{value['mean']:.{digits}f}" + ("" if value["std"] is None else f" ± {value['std']:.{digits}f}")

    table = Table(title=f"{result['source']}: mean ± standard deviation over the runs", title_justify="left")
    table.add_column("model")
    for title in ("mean score", *(f"{task} ({metric})" for task, metric in result["primary"].items())):
        table.add_column(title, justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("parameters", justify="right")
    for name, model in result["models"].items():
        scores = [model["tasks"][task][metric] for task, metric in result["primary"].items()]
        figures = [cell(model["mean_score"]), *(cell(score) for score in scores), cell(model["seconds"], 1)]
        table.add_row(name, *figures, f"{model['parameters']:,}")
    return table


def crossval_table(result: Mapping[str, Any]) -> Table:
    """Mean and standard deviation of every metric over the folds of `cross_validate`'s result, and its value over the
    test bags of all folds as one set, a mean over the repeats."""
    title = f"{result['source']}: {result['folds']} folds x {result['repeats']} repeats"
    table = Table(title=title, title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column)
    pooled = result["pooled"]
    for column in ("mean", "std", "lowest", "highest", *(["pooled"] if pooled else [])):
        table.add_column(column, justify="right")

    def over_repeats(values: Sequence[float | None]) -> list[str]:
        known = [value for value in values if value is not None]
        return [_cell(sum(known) / len(known) if known else None)] if values else []

    for task, metrics in result["tasks"].items():
        for index, (metric, figures) in enumerate(metrics.items()):
            values = [_cell(figures[key]) for key in ("mean", "std", "min", "max")]
            values += over_repeats([repeat["tasks"][task][metric] for repeat in pooled])
            last = index == len(metrics) - 1
            table.add_row(task if index == 0 else "", metric_name(metric).title, *values, end_section=last)
    figures = result["mean_score"]
    values = [_cell(figures[key]) for key in ("mean", "std", "min", "max")]
    table.add_row("mean_score", "", *values, *over_repeats([repeat["mean_score"] for repeat in pooled]))
    return table


def shots_table(result: Mapping[str, Any]) -> Table:
    """Mean and standard deviation over the folds of every metric for each number of shots of `few_shot`'s result."""
    title = f"{result['source']}: bags of each class, {result['folds']} folds x {result['repeats']} repeats"
    table = Table(title=title, title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column)
    results = result["results"]
    for found in results:
        table.add_column(str(found["shots"]), justify="right")

    for task, metrics in results[0]["tasks"].items():
        for index, metric in enumerate(metrics):
            cells = [_spread(found["tasks"][task][metric]) for found in results]
            table.add_row(
                task if index == 0 else "", metric_name(metric).title, *cells, end_section=index == len(metrics) - 1
            )
    table.add_row("mean_score", "", *(_spread(found["mean_score"]) for found in results))
    bags = [(found["bags"]["min"], found["bags"]["max"]) for found in results]
    table.add_row("training bags", "", *(f"{low}" if low == high else f"{low} to {high}" for low, high in bags))
    return table


def search_table(result: Mapping[str, Any]) -> Table:
    """Mean and standard deviation over the outer folds of `search`'s result, of what was configured and of what the
    search chose in each."""
    title = f"{result['source']}: {result['folds']} outer folds"
    table = Table(title=title, title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("given", "searched"):
        table.add_column(column, justify="right")
    found = [result[column] for column in ("given", "searched")]
    for task, metrics in found[0]["tasks"].items():
        for index, metric in enumerate(metrics):
            cells = [_spread(column["tasks"][task][metric]) for column in found]
            last = index == len(metrics) - 1
            table.add_row(task if index == 0 else "", metric_name(metric).title, *cells, end_section=last)
    for name in ("mean_score", "skill"):
        table.add_row(name, "", *(_spread(column[name]) for column in found))
    return table


def parity_table(report: Mapping[str, Any]) -> Table:
    """The rows of a parity report, failures in bold.

    Args:
        report: `rows`, a list of mappings with the same keys, one of which, `verdict`, is `pass` for what passed (or
            says why it was not run).
    """
    rows = report["rows"]
    verdicts = [str(row["verdict"]) for row in rows]
    count = sum(verdict == "pass" for verdict in verdicts)
    table = Table(title=f"Parity with the float64 reference: {count} of {len(rows)} passed", title_justify="left")
    columns = [column for column in rows[0] if any(row[column] for row in rows)] if rows else []
    for column in columns:
        number = all(isinstance(row[column], float) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if number else "left")
    for row, verdict in zip(rows, verdicts, strict=True):
        cells = [f"{row[c]:.3g}" if isinstance(row[c], float) else escape(str(row[c] or "-")) for c in columns]
        table.add_row(*cells, style="bold red" if verdict == "fail" else None)
    return table


def collect_info() -> dict[str, Any]:
    """Versions, devices and backends as plain values."""
    from umda_fast import ops
    from umda_fast.runtime.provenance import machine, versions

    return {
        "versions": versions(),
        "machine": machine(),
        "backends": ops.backend_status(),
        "default_backend": ops.get_backend(),
    }


def print_info(console: Console, report: Mapping[str, Any]) -> None:
    """Print what `collect_info` found."""
    table = Table(show_header=False, box=None)
    for name, version in report["versions"].items():
        table.add_row(name, version)
    host = report["machine"]
    table.add_row("device", f"cpu: {host['processor']}, {host['cores']} cores, {host['threads']} threads")
    for index, device in enumerate(host["devices"]):
        memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
        table.add_row("device", f"cuda:{index}: {device['name']}, {memory}, {device['capability']}")
    for backend, reason in report["backends"].items():
        table.add_row(f"backend {backend}", "available" if reason is None else f"not available: {reason}")
    if report["default_backend"] != "auto":
        table.add_row("UMDA_FAST_BACKEND", report["default_backend"])
    console.print(table)


def print_inspection(console: Console, report: Any, scaling: Sequence[str] = ()) -> None:
    """Print a `umda_fast.data.SourceReport`: bags, views, tasks, columns of the table of labels, and what is wrong; and
    how features are scaled, a line for every view."""
    console.print(f"[bold]{escape(report.name)}[/bold] ({report.format}): {escape(report.description)}", soft_wrap=True)
    splits = list(report.bags)

    table = Table(title="Bags", title_justify="left")
    table.add_column("split")
    patients = report.patients
    counted = ("bags", "patients", "instances") if patients else ("bags", "instances")
    for column in (*counted, "min", "q25", "median", "q75", "max", "mean"):
        table.add_column(column, justify="right")
    for split in splits:
        sizes = report.instances_per_bag[split]
        figures = [
            f"{sizes[name]:g}" if name in sizes else "-" for name in ("min", "q25", "median", "q75", "max")
        ]
        average = f"{sizes['mean']:.1f}" if "mean" in sizes else "-"
        counts = (report.bags, *([patients] if patients else []), report.instances)
        table.add_row(split, *(f"{count[split]:,}" for count in counts), *figures, average)
    table.caption = "min to mean: instances in a bag" + (
        "; instances have coordinates" if report.coords else ""
    )
    console.print(table)

    table = Table(title="Views", title_justify="left")
    table.add_column("view")
    table.add_column("width", justify="right")
    for split in splits:
        table.add_column(f"missing, {split}", justify="right")
    for view in report.views:
        shares = [view.missing[split] for split in splits]
        table.add_row(escape(view.name), str(view.width), *("-" if s is None else f"{s:.1%}" for s in shares))
    console.print(table)

    table = Table(title="Tasks", title_justify="left")
    for column in ("task", "kind", "classes, with how many"):
        table.add_column(column, overflow="fold")
    for split in splits:
        table.add_column(f"labels, {split}", justify="right")
    for split in splits:
        table.add_column(f"missing, {split}", justify="right")
    for task in report.tasks:
        found = [sum(counts) for counts in zip(*task.counts.values(), strict=True)]
        classes = ", ".join(f"{name} {count:,}" for name, count in zip(task.classes, found, strict=True))
        if "events" in task.values.get(splits[0], {}):
            events, censored, lowest, highest = (
                task.values[splits[0]][key] for key in ("events", "censored", "min", "max")
            )
            classes = f"{events:g} events, {censored:g} censored, times {lowest:.4g} to {highest:.4g}"
        elif splits[0] in task.values:
            lowest, highest, mean, std = (
                task.values[splits[0]][key] for key in ("min", "max", "mean", "std")
            )
            classes = f"{lowest:g} to {highest:g}, mean {mean:.3g}, std {std:.3g}"
        labelled = (f"{task.labelled[split]:,}" for split in splits)
        kind = task.kind if task.positive is None else f"{task.kind}: probability of {task.positive}"
        missing = (f"{task.missing[split]:,}" for split in splits)
        table.add_row(escape(task.name), escape(kind), escape(classes), *labelled, *missing)
    console.print(table)

    if report.columns:
        table = Table(title="Columns of the table of labels", title_justify="left")
        for column in ("column", "taken for", "why"):
            table.add_column(column, overflow="fold")
        for use in report.columns:
            table.add_row(escape(use.name), escape(use.use), escape(use.why))
        console.print(table)

    for line in scaling:
        console.print(line, soft_wrap=True)
    if not report.problems:
        console.print("no problem found")
        return
    console.print(
        f"[bold]{len(report.problems)} problem(s), the first: {escape(report.problems[0])}[/bold]", soft_wrap=True
    )
    for problem in report.problems[1:20]:
        console.print(f"  {escape(problem)}", soft_wrap=True)
    if len(report.problems) > 20:
        console.print(f"  and {len(report.problems) - 20} more (--json FILE lists all)")


def print_profile(console: Console, result: Mapping[str, Any], folder: Path) -> None:
    """The step by block and the operations that take most of it, beside what their bytes allow."""
    timed, device = result["steps"]["timed"], result["total"]["device_seconds"] is not None
    instances = result["instances"]["timed"] / timed
    title = f"A step of {instances:,.0f} instances: {result['seconds_per_step'] * 1e3:.1f} ms, mean of {timed}"
    blocks = [(f"{row['block']}", row["pass"], row) for row in result["blocks"]]
    blocks.append(("total", "", result["total"]))
    console.print(_profile_table(title, ("block", "pass"), blocks, device))
    operations = [(row["operation"], "", row) for row in result["operations"]]
    shown = [one for at, one in enumerate(operations) if at < 10 or one[0].startswith("umda_fast::")]
    title = f"Its operations: all of umda_fast and the first of {len(operations)}"
    console.print(_profile_table(title, ("operation", ""), shown, device))
    rate = result["copy_bytes_per_second"] / 1e9
    console.print(f"floor: bytes at the {rate:.1f} GB/s of a copy, measured in this run", highlight=False)
    console.print(f"trace: {folder / 'trace.json.gz'} (chrome://tracing, ui.perfetto.dev)", soft_wrap=True)


def _profile_table(
    title: str, names: tuple[str, str], rows: Sequence[tuple[str, str, Mapping[str, Any]]], device: bool
) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names[: 1 + bool(names[1])]:
        table.add_column(name)
    for name in ("host ms", *(["device ms"] if device else []), "calls", "MB", "floor ms", "share of floor"):
        table.add_column(name, justify="right")
    for first, second, row in rows:
        seconds = [row["host_seconds"], *([row["device_seconds"]] if device else [])]
        cells = [f"{value * 1e3:.2f}" for value in seconds]
        cells += [f"{row['calls']:,.0f}", f"{row['bytes'] / 1e6:.2f}", f"{row['floor_seconds'] * 1e3:.2f}"]
        cells.append("-" if row["share"] is None or not row["bytes"] else f"{row['share']:.2f}")
        table.add_row(escape(first), *([second] if names[1] else []), *cells)
    return table
