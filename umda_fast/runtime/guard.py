"""Stop before a NaN or an infinity reaches the weights, and say which bag and which tensor it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from umda_fast.data import BagBatch
from umda_fast.data.arrays import all_finite
from umda_fast.errors import DataError

__all__ = ["NonFiniteError", "check_batch", "explain_non_finite"]


class NonFiniteError(RuntimeError):
    """A loss, an output or a gradient is NaN or infinite although every feature was finite; the weights are
    untouched.
    """


def check_batch(batch: BagBatch) -> None:
    """Raise `DataError` naming the bag, the view (or label) and the row of the first NaN or infinity in
    `batch`.

    Meant for a batch still in host memory, where it costs no synchronisation with a device.
    """
    for view, features in batch.views.items():
        if all_finite(features):
            continue
        bad = ~torch.isfinite(features).flatten(1).all(dim=1)
        rows = bad.nonzero().flatten()
        row = int(rows[0])
        bag = int(torch.searchsorted(batch.ptr.cpu(), torch.tensor(row), right=True)) - 1
        first = row - int(batch.ptr[bag])
        values = features[row].flatten()
        column = int((~torch.isfinite(values)).nonzero().flatten()[0])
        raise DataError(
            f"bag {batch.names[bag]!r}, view {view!r}: instance {first}, feature {column} is "
            f"{float(values[column])}; features must be finite ({rows.numel()} bad instances in this batch)"
        )
    for task, labels in batch.labels.items():
        if not labels.is_floating_point():
            continue
        present = batch.label_mask[task]
        bad = present & ~torch.isfinite(labels).reshape(len(labels), -1).all(dim=1)
        if bool(bad.any()):
            bag = int(bad.nonzero()[0])
            raise DataError(
                f"bag {batch.names[bag]!r}, label {task!r} is {labels[bag].tolist()}; labels must be finite "
                "(leave a missing label out, or blank)"
            )


def explain_non_finite(
    batch: BagBatch,
    logits: Mapping[str, Tensor],
    losses: Mapping[str, Tensor],
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    step: int,
) -> NonFiniteError:
    """The error for a step whose losses or gradients are not finite: names bags (from their logits), then
    tensors.

    Called only on the way out, so it may read from the device as often as it likes.
    """
    bags: dict[str, str] = {}
    for task, values in logits.items():
        bad = ~torch.isfinite(values.detach()).flatten(1).all(dim=1)
        for index in bad.nonzero().flatten().tolist():
            bags.setdefault(batch.names[index], f"logits of task {task!r}")
    parts = [f"step {step}: training stopped before the weights were touched"]
    if bags:
        shown = [f"bag {name!r} ({what})" for name, what in list(bags.items())[:3]]
        parts.append(
            "not finite: " + ", ".join(shown) + (f" and {len(bags) - 3} more bags" if len(bags) > 3 else "")
        )
    bad_losses = [name for name, value in losses.items() if not bool(torch.isfinite(value.detach()).all())]
    if bad_losses:
        parts.append("loss of " + ", ".join(repr(name) for name in bad_losses))
    bad_gradients = [
        name for name, p in parameters if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    if bad_gradients:
        more = f" and {len(bad_gradients) - 3} more" if len(bad_gradients) > 3 else ""
        parts.append("gradient of " + ", ".join(bad_gradients[:3]) + more)
    if not bags:
        names = ", ".join(repr(name) for name in batch.names[:3])
        parts.append(f"batch of {len(batch.names)} bags beginning with {names}")
    parts.append("the features are finite: lower train.lr or train.clip, or use precision 32-true")
    return NonFiniteError("; ".join(parts))
