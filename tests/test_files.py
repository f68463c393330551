import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from umda_fast.files import atomic_file, json_ready, save_torch, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"
    write_text(target, "old")

    def stopped() -> None:
        with atomic_file(target) as stream:
            stream.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_the_new_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "below" / "file.bin"
    with atomic_file(target) as stream:
        stream.write(b"x" * 100)
        assert not target.exists()
    assert target.read_bytes() == b"x" * 100


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "file").st_mode) == 0o640


def test_json_has_no_nan_and_plain_numbers(tmp_path: Path) -> None:
    value = {
        "a": math.nan,
        "b": [np.float32(1.5), np.int64(2)],
        "c": torch.tensor([1.0, math.inf]),
        "d": (True, None),
    }
    assert json_ready(value) == {"a": None, "b": [1.5, 2], "c": [1.0, None], "d": [True, None]}
    write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text())["a"] is None


def test_save_torch_reads_back(tmp_path: Path) -> None:
    save_torch(tmp_path / "state.pt", {"x": torch.arange(3), "n": 2})
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["n"] == 2
    assert torch.equal(state["x"], torch.arange(3))
