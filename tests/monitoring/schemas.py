"""Schemas that are not part of the project: looked up beside it, and loudly missed when they are not there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

from tests.monitoring.rules import ROOT

SCHEMAS: Final = ROOT / ".." / "shared" / "schemas"


def faults(schema: str, document: Any, definition: str = "") -> list[str]:
    """What the schema finds wrong with the document; `definition` is the part of the schema that it is held against."""
    path = Path(SCHEMAS, schema)
    if not path.is_file():
        pytest.skip(f"no {path}: NOT VALIDATED")
    whole: Mapping[str, Any] = json.loads(path.read_text())
    chosen = {**whole, "$ref": f"#/definitions/{definition}"} if definition else whole
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(chosen).iter_errors(document)]
