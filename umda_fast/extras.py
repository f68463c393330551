"""Packages that come with an extra of the installation, and what is said where one is missing. Lowest floor."""

from __future__ import annotations

import importlib.util

__all__ = ["EXTRAS", "TRAINING", "MissingExtraError", "require"]

EXTRAS = {
    "lightning_fabric": "train",
    "matplotlib": "train",
    "pydantic": "train",
    "rich": "train",
    "safetensors": "train",
    "scipy": "train",
    "sklearn": "train",
    "tensorboard": "train",
    "torchmetrics": "train",
    "typer": "train",
    "yaml": "train",
    "h5py": "io",
    "openpyxl": "io",
    "pandas": "io",
    "torch_geometric": "graph",
    "sentence_transformers": "text",
    "torchjd": "balancers",
    "optuna": "search",
}
"""The extra that brings a package, by the name it is imported under."""


TRAINING = tuple(package for package, extra in EXTRAS.items() if extra == "train" and package != "typer")
"""What a training needs at some point; a command needs typer too."""


class MissingExtraError(ModuleNotFoundError):
    """What needs which package, and the command that installs the extra it comes with; `name`: of the package."""

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        extra = EXTRAS[package]
        super().__init__(
            f"{what} needs {package}, of the extra {extra}: pip install 'umda_fast[{extra}]'", name=package
        )

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str | None]]:
        return type(self), (self.what, self.name)  # files are first read in another process


def require(what: str, *packages: str) -> None:
    """Raise MissingExtraError for the first package that is not there; nothing is imported.

    Args:
        what: needs them, the beginning of the message.
        packages: of `EXTRAS`.
    """
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # a finder refuses it; a module without a spec takes its place
            found = None
        if found is None:
            raise MissingExtraError(what, package)
