"""Files that cannot be written are named before anything is computed for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import call

COMMANDS = {
    "info": ["info", "--json", "FILE"],
    "inspect": ["inspect", "digits", "--json", "FILE"],
    "evaluate": ["evaluate", "no-run", "--json", "FILE"],
    "predict": ["predict", "no-run", "--data", "digits", "--out", "FILE"],
    "attention": ["predict", "no-run", "--data", "digits", "--out", "p.csv", "--attention", "FILE"],
    "report": ["report", "no-run", "--out", "FILE"],
    "parity": ["parity", "--ops", "bag_pool", "--json", "FILE"],
    "junit": ["parity", "--ops", "bag_pool", "--junit", "FILE"],
    "bench": ["bench", "--quick", "--ops", "knn", "--json", "FILE"],
    "page": ["bench", "--quick", "--ops", "knn", "--report", "FILE"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for place, words in (("folder", "expected a file, got a directory"), ("file/x", "its folder cannot be made")):
        assert call(*(place if word == "FILE" else word for word in COMMANDS[command])) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("umda-fast: ")
        assert words in line
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}
