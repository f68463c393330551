"""What tests of the commands on directories of slides share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model; nothing about the data but the size of its batches."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    model = {"width": 16, "heads": 2, "layers": 1}
    path.write_text(yaml.safe_dump({"device": "cpu", "data": {"budget": 40}, "model": model, "train": {"epochs": 1}}))
    return path
