"""What a change of a JSON Schema takes away, for the part of JSON Schema that the contract uses.

Commands are read by the worker: whatever the old schema lets through, the new one must. Outcomes are read by consumers:
whatever the new schema lets through, the old one must. Both are the same question, asked in two directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

Schema = dict[str, Any]

_NOT_RULES: Final = frozenset({"$schema", "$id", "$comment", "title", "description", "examples"})
_UPPER: Final = ("maxLength", "maxItems", "maximum")
_LOWER: Final = ("minLength", "minItems", "minimum")
_KNOWN: Final = _NOT_RULES | {
    *_UPPER, *_LOWER, "type", "enum", "const", "pattern", "format", "properties", "required", "items", "anyOf", "oneOf",
}  # fmt: skip


def breaks_producers(old: Schema, new: Schema) -> list[str]:
    """Why commands that were good are so no longer; empty when none are."""
    return [*_vanished(old, new, "command"), *_narrowed(old, new, "command")]


def breaks_consumers(old: Schema, new: Schema) -> list[str]:
    """Why outcomes can be what consumers were told they are not; empty when they cannot."""
    return [*_vanished(old, new, "outcome"), *_narrowed(new, old, "outcome")]


def _narrowed(wide: Schema, tight: Schema, where: str) -> Iterator[str]:
    """Where ``tight`` refuses what ``wide`` lets through. A new field is no difference: nobody knew it before."""
    unknown = (wide.keys() | tight.keys()) - _KNOWN
    if unknown:
        yield f"{where}: {', '.join(sorted(unknown))} cannot be compared; teach this module"
    yield from _types(wide, tight, where)
    yield from _values(wide, tight, where)
    yield from _limits(wide, tight, where)
    for name in ("pattern", "format"):
        if name in tight and tight[name] != wide.get(name):
            yield f"{where}: {name} is {tight[name]!r} on one side and {wide.get(name)!r} on the other"
    yield from _fields(wide, tight, where)
    if "items" in tight:
        yield from _narrowed(wide.get("items", {}), tight["items"], f"{where}[]")
    yield from _alternatives(wide, tight, where)


def _types(wide: Schema, tight: Schema, where: str) -> Iterator[str]:
    if "type" in tight:
        lost = _as_set(wide.get("type", "anything")) - _as_set(tight["type"])
        lost -= {"integer"} if "number" in _as_set(tight["type"]) else set()
        if lost:
            yield f"{where}: type {', '.join(sorted(lost))} is not taken"


def _as_set(types: str | list[str]) -> set[str]:
    return {types} if isinstance(types, str) else set(types)


def _values(wide: Schema, tight: Schema, where: str) -> Iterator[str]:
    allowed = _enumerated(tight)
    if allowed is None:
        return
    said = _enumerated(wide)
    if said is None:
        yield f"{where}: only {', '.join(map(str, allowed))} is taken"
    elif lost := [value for value in said if value not in allowed]:
        yield f"{where}: {', '.join(map(str, lost))} is not taken"


def _enumerated(schema: Schema) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _limits(wide: Schema, tight: Schema, where: str) -> Iterator[str]:
    for name in _UPPER:
        if name in tight and wide.get(name, float("inf")) > tight[name]:
            yield f"{where}: {name} is {tight[name]}, was {wide.get(name, 'unlimited')}"
    for name in _LOWER:
        if name in tight and wide.get(name, 0) < tight[name]:
            yield f"{where}: {name} is {tight[name]}, was {wide.get(name, 'unlimited')}"


def _fields(wide: Schema, tight: Schema, where: str) -> Iterator[str]:
    for name in tight.get("required", ()):
        if name not in wide.get("required", ()):
            yield f"{where}.{name}: is required on one side only"
    ours, theirs = wide.get("properties", {}), tight.get("properties", {})
    for name in ours.keys() & theirs.keys():
        yield from _narrowed(ours[name], theirs[name], f"{where}.{name}")


def _alternatives(wide: Schema, tight: Schema, where: str) -> Iterator[str]:
    """Each alternative of ``wide`` must fit into one of ``tight``."""
    for name in ("anyOf", "oneOf"):
        if name not in tight:
            continue
        if name not in wide:
            yield f"{where}: {name} has no counterpart on the other side"
        for number, ours in enumerate(wide.get(name, ())):
            if all(any(_narrowed(ours, theirs, where)) for theirs in tight[name]):
                yield f"{where}: alternative {number + 1} of {name} fits none on the other side"


def _vanished(old: Schema, new: Schema, where: str) -> Iterator[str]:
    """Fields that ``new`` knows no longer: whoever sent or read them is served no more."""
    before, after = old.get("properties", {}), new.get("properties", {})
    for name in before:
        if name in after:
            yield from _vanished(before[name], after[name], f"{where}.{name}")
        else:
            yield f"{where}.{name}: was removed"
