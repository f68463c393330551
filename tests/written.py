"""JSON that a command wrote, held to its schema."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from umda_fast.runtime.provenance import SCHEMAS, schema_file


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(schema_file(name).read_text(encoding="utf-8"))
    return found


@functools.cache
def validator(name: str) -> Draft202012Validator:
    known = [(f"{one}.json", Resource.from_contents(schema(one))) for one in ("stamp", *SCHEMAS)]
    return Draft202012Validator(schema(name), registry=Registry().with_resources(known))


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The content of a file that must be valid under the schema `name`."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    validator(name).validate(found)
    assert found["schema"] == {"name": f"umda_fast.{name}", "version": SCHEMAS[name]}
    return found
