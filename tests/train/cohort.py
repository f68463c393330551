"""A directory of bags that changes after a run was trained on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from umda_fast.train import RunConfig, make_config


class Cohort:
    """Bags `S00.npz`, ... with a table of labels in a directory; of every bag it is known which one it was first."""

    def __init__(self, root: Path, bags: int = 0) -> None:
        self.root = root
        self.root.mkdir(parents=True)
        self.bags: dict[str, int] = {}  # name now -> which bag it is
        self.labels: dict[str, str] = {}
        self.made = 0
        for _ in range(bags):
            self.add()

    def add(self, name: str | None = None) -> str:
        """A bag that was not there before."""
        number, self.made = self.made, self.made + 1
        name = f"S{number:02}" if name is None else name
        rng = np.random.default_rng(number)
        np.savez(self.root / f"{name}.npz", features=rng.normal(size=(3 + number % 3, 5)).astype("f4") + number % 2)
        self.bags[name], self.labels[name] = number, "ab"[number % 2]
        return name

    def rename(self, name: str, other: str) -> None:
        (self.root / f"{name}.npz").rename(self.root / f"{other}.npz")
        self.bags[other], self.labels[other] = self.bags.pop(name), self.labels.pop(name)

    def remove(self, name: str) -> None:
        (self.root / f"{name}.npz").unlink()
        del self.bags[name], self.labels[name]

    def write(self, **columns: str) -> None:
        """labels.csv as things stand, with columns of one value."""
        lines = [",".join(["slide_id", "y", *columns])]
        lines += [",".join([name, label, *columns.values()]) for name, label in sorted(self.labels.items())]
        (self.root / "labels.csv").write_text("\n".join(lines) + "\n")

    def swap(self, name: str, other: str) -> None:
        """Each under the other's name."""
        self.rename(name, "between")
        self.rename(other, name)
        self.rename("between", other)

    def replace(self, name: str) -> None:
        """Another bag under the name."""
        self.remove(name)
        self.add(name)

    def copy(self, root: Path) -> Cohort:
        """The same in another place."""
        other = object.__new__(Cohort)
        other.root, other.bags, other.labels, other.made = root, dict(self.bags), dict(self.labels), self.made
        shutil.copytree(self.root, root)
        return other


def moved_run(run: Path, trained_on: Cohort, cohort: Cohort, place: Path) -> Path:
    """A copy of a run, at `place`, as if it had been trained on `cohort`."""
    shutil.copytree(run, place)
    config = (place / "config.yaml").read_text().replace(str(trained_on.root), str(cohort.root))
    (place / "config.yaml").write_text(config)
    return place


def cohort_config(source: Path | str, **data: object) -> RunConfig:
    """A configuration of seconds for it."""
    return make_config(
        {
            "device": "cpu",
            "data": {"source": str(source), **data},
            "model": {"width": 16, "heads": 2, "layers": 1},
            "train": {"epochs": 1},
        }
    )
