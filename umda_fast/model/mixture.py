"""A model and simpler ones beside it, whose logits are added up task by task."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from umda_fast.model import pretrained
from umda_fast.model._numerics import autocast_off, wide
from umda_fast.model.baselines.linear import Linear

__all__ = ["MEMBERS", "MIXTURE", "Mixture", "with_members"]

MIXTURE = "mixture.json"
"""Says what is mixed into the model beside it, and how much of it."""
MEMBERS: Mapping[str, type[Linear]] = {Linear.architecture: Linear}
"""What may be mixed in, by architecture: it has `bag_logits(views, ptr, mask)` and is cheap."""


class Mixture(nn.Module):
    """`logits_t = c[t, 0] model_t + sum_m c[t, m] member_m,t`; all else of the output is the model's.

    Source of the idea: Breiman, "Stacked regressions", 1996. How c is chosen: `umda_fast.score.mixing`.

    Args:
        model: `UMDA` or another, with a configuration of the same tasks.
        members: by name, a key of `MEMBERS`.
        coefficients: task -> c, one for the model and one for every member.

    Raises:
        ValueError: the coefficients are not those of these tasks and members, or not finite.
    """

    def __init__(
        self, model: Any, members: Mapping[str, Linear], coefficients: Mapping[str, Sequence[float]]
    ) -> None:
        super().__init__()
        names = [task.name for task in model.config.tasks]
        if list(coefficients) != names:
            raise ValueError(f"coefficients: expected the tasks {', '.join(names)}, got {', '.join(coefficients)}")
        for name, own in coefficients.items():
            if len(own) != 1 + len(members) or not all(math.isfinite(value) for value in own) or not any(own):
                expected = f"{1 + len(members)} finite numbers, not all 0"
                raise ValueError(f"coefficients: {name}: expected {expected}, got {list(own)}")
        self.model = model
        self.members = nn.ModuleDict(dict(members))
        self.coefficients = {name: tuple(float(value) for value in own) for name, own in coefficients.items()}

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @config.setter
    def config(self, config: Any) -> None:
        self.model.config = config

    @property
    def shares(self) -> dict[str, float]:
        """How much of the mixture is not the model, up to 1, of the tasks in which anything is: what the model's
        attention does not tell."""
        return {name: 1.0 - own[0] for name, own in self.coefficients.items() if own[0] < 1.0}

    def forward(
        self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None = None, *args: Any, **further: Any
    ) -> Any:
        """Takes what the model takes, and returns what it returns."""
        return self.mixed(self.model(views, ptr, mask, *args, **further), views, ptr, mask)

    def mixed(self, out: Any, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None) -> Any:
        """`out`, which the model gave for these bags, with the logits of the mixture, float32 or float64."""
        # In full precision, whatever the model runs in: the members are of little work, and their inputs as they came.
        with autocast_off(ptr):
            others = [member.bag_logits(views, ptr, mask) for member in self.members.values()]  # type: ignore[operator]
            logits = {}
            for name, (own, *rest) in self.coefficients.items():
                parts = [(own, out.logits[name]), *zip(rest, (other[name] for other in others), strict=True)]
                # What has no part in it need not be finite.
                logits[name] = torch.stack([c * wide(value) for c, value in parts if c != 0.0]).sum(0)
        return replace(out, logits=logits)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the model's files and, beside them, mixture.json and the weights of every member."""
        self.model.save_pretrained(directory)
        described = {}
        for name, member in self.members.items():
            pretrained.save_weights(member, directory, f"{name}.safetensors")
            described[name] = member.config.to_dict()  # type: ignore[union-attr, operator]
        text = json.dumps({"members": described, "coefficients": self.coefficients}, indent=2)
        (Path(directory) / MIXTURE).write_text(text + "\n", encoding="utf-8")


def with_members(model: Any, directory: str | os.PathLike[str]) -> Any:
    """`model`, read from `directory`, with what was mixed into it there: a `Mixture`, or the model itself where nothing
    was.

    Raises:
        OSError: weights are missing. KeyError, TypeError, ValueError: mixture.json is something else. RuntimeError: the
            weights do not fit.
    """
    path = Path(directory) / MIXTURE
    if not path.is_file():
        return model
    content = json.loads(path.read_text(encoding="utf-8"))
    members = {}
    for name, options in content["members"].items():
        if name not in MEMBERS:
            raise ValueError(f"{MIXTURE}: members: expected some of {', '.join(MEMBERS)}, got {name!r}")
        kind = MEMBERS[name]
        members[name] = pretrained.load_weights(kind(kind.config_class(**options)), directory, f"{name}.safetensors")
    return Mixture(model, members, content["coefficients"]).eval()
