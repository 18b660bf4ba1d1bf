"""The settings as the README and each `--help` show them."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import (
    SecretStr,
)
from pydantic.fields import FieldInfo

from worker.settings.group import Group
from worker.settings.groups import GROUPS


def reference(groups: Iterable[type[Group]] = GROUPS) -> list[tuple[str, str, str]]:
    """Variable, default and meaning of every setting, in Markdown, as the README shows them."""
    return [
        (group.variable(name), _default(field), field.description or "")
        for group in groups
        for name, field in group.model_fields.items()
    ]


def _default(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default" in extra:
        return str(extra["default"])
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return ""
    return f"`{_written(value)}`"


def _written(value: object) -> str:
    """A default as one would write it in the environment."""
    match value:
        case SecretStr():
            return value.get_secret_value()
        case bool():
            return str(value).lower()
        case tuple():
            return ",".join(map(str, value))
    return str(value)
