"""The settings as the README and each `--help` show them."""

from __future__ import annotations

from collections.abc import Iterable

from worker.settings.group import Declared, Group, Secret
from worker.settings.groups import GROUPS


def reference(groups: Iterable[type[Group]] = GROUPS) -> list[tuple[str, str, str]]:
    """Variable, default and meaning of every setting, in Markdown, as the README shows them."""
    return [
        (group.variable(name), _default(declared), declared.meaning)
        for group in groups
        for name, declared in group.declared().items()
    ]


def _default(declared: Declared) -> str:
    if declared.shown is not None:
        return declared.shown
    if declared.required:
        return "required"
    return "" if declared.default is None else f"`{_written(declared.default)}`"


def _written(value: object) -> str:
    """A default as one would write it in the environment."""
    match value:
        case Secret():
            return value.get_secret_value()
        case bool():
            return str(value).lower()
        case tuple():
            return ",".join(map(str, value))
    return str(value)
