"""The JSON schemas themselves; what the commands write is held to them where it is tested (`tests/written.py`)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, ValidationError

from tests.written import schema, validator
from umda_fast.runtime import provenance
from umda_fast.runtime.provenance import SCHEMAS, commit, schema_file, stamped

TESTS = Path(__file__).parent


def test_every_schema_is_there_and_is_one() -> None:
    files = {path.stem for path in Path(str(schema_file("stamp"))).parent.iterdir()}
    assert files == {"stamp", *SCHEMAS}
    for name in files:
        Draft202012Validator.check_schema(schema(name))
        assert schema(name)["$id"] == f"{name}.json"


def test_the_output_of_every_command_is_held_to_its_schema() -> None:
    read = re.compile(r'read_json\([^\n]*, "(\w+)"\)')
    assert {name for path in TESTS.rglob("*.py") for name in read.findall(path.read_text())} == set(SCHEMAS)


def test_a_schema_refuses_what_is_not_described() -> None:
    content = {"backends": dict.fromkeys(("reference", "cpp", "triton", "cuda")), "default_backend": "auto"}
    whole = stamped("info", content)
    validator("info").validate(whole)
    for wrong in ({"schema": {"name": "umda_fast.parity", "version": 1}}, {"default_backend": "fast"}, {"other": 1}):
        with pytest.raises(ValidationError):
            validator("info").validate({**whole, **wrong})
    for key in ("schema", "versions", "commit", "machine", "time", "backends"):
        with pytest.raises(ValidationError):
            validator("info").validate({name: value for name, value in whole.items() if name != key})


def test_the_commit_is_that_of_umda_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a repository in which somebody has installed it."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    place = tmp_path / "env" / "site-packages" / "umda_fast"
    place.mkdir(parents=True)
    monkeypatch.setattr(provenance.umda_fast, "__file__", str(place / "__init__.py"))
    assert commit() == {"hash": None, "clean": None}
