"""A model as two files: model.safetensors with its weights, config.json with its architecture and options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from umda_fast.extras import require

__all__ = ["load_weights", "read_options", "save", "save_weights"]

WEIGHTS, OPTIONS = "model.safetensors", "config.json"
Model = TypeVar("Model", bound=nn.Module)


def save(
    model: nn.Module, directory: str | os.PathLike[str], architecture: str, options: Mapping[str, Any]
) -> None:
    """Write both files into `directory`, which is made; needs the package safetensors."""
    require("saving a model", "safetensors")
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    save_weights(model, place)
    text = json.dumps({"architecture": architecture, **options}, indent=2)
    (place / OPTIONS).write_text(text + "\n", encoding="utf-8")


def save_weights(model: nn.Module, directory: str | os.PathLike[str], name: str = WEIGHTS) -> None:
    """Write the weights alone, as the file `name`, into `directory`, which is there."""
    require("saving a model", "safetensors")
    from safetensors.torch import save_file

    # Clones: a file of safetensors cannot hold tensors that share memory (tied weights of an encoder).
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(weights, Path(directory) / name)


def read_options(directory: str | os.PathLike[str], architecture: str) -> dict[str, Any]:
    """The options that `save` wrote for a model of `architecture`.

    Raises:
        OSError: no config.json. ValueError: it is of another architecture.
    """
    values: dict[str, Any] = json.loads((Path(directory) / OPTIONS).read_text(encoding="utf-8"))
    found = values.pop("architecture", None)
    if found != architecture:
        raise ValueError(f"{OPTIONS}: architecture: expected {architecture}, got {found!r}")
    return values


def load_weights(model: Model, directory: str | os.PathLike[str], file: str = WEIGHTS) -> Model:
    """`model`, which is on the CPU, with the weights that `save` or `save_weights` wrote, in the dtype they had.

    Raises:
        OSError: no such file. RuntimeError: the weights do not fit.
    """
    require("reading a saved model", "safetensors")
    from safetensors.torch import load_file

    weights = load_file(Path(directory) / file)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in weights:
            tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights)
    return model
