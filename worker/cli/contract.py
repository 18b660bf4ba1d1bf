"""`qris-expire contract`: the messages, as documents for people and generators."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from worker.cli import Trouble
from worker.cli.command_line import Argument, Option
from worker.settings import AmqpSettings, load

if TYPE_CHECKING:
    from worker.core.contract import Examples


FILES: Final = {
    "asyncapi": "asyncapi.json",
    "command": "command.schema.json",
    "outcome": "outcome.schema.json",
}
"""The documents and the names of their files, in the package's directory ``contract`` and with ``--output``."""


def contract(
    document: Annotated[str, Argument(choices=tuple(FILES), help="Which document.")] = "asyncapi",
    output: Annotated[Path | None, Option(metavar="DIR", help="Write all three documents into this directory.")] = None,
) -> None:
    """Prints the contract of the messages, as JSON.

    asyncapi (AsyncAPI 3.0) has everything: exchanges, routing keys, properties, headers, schemas and examples. command
    and outcome are JSON Schemas (2020-12) of the two bodies, to validate messages or to generate code.

    Within a major version no field is removed and no further field is required. Outcomes may get further fields.

    Examples:

        qris-expire contract outcome
        qris-expire contract --output schemas
    """
    made = documents(load(AmqpSettings).prefix)
    if output is None:
        print(made[document], end="")
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        for which, text in made.items():
            (output / FILES[which]).write_text(text, encoding="utf-8")
    except OSError as error:
        raise Trouble(f"{error.filename}: cannot be written ({error.strerror}); give another --output") from None
    print(f"wrote {', '.join(FILES.values())} to {output}")


def documents(prefix: str) -> dict[str, str]:
    """All of them as text, with the names under ``prefix``."""
    from worker.core.contract import asyncapi, command_schema, outcome_schema

    made: dict[str, Any] = {
        "asyncapi": asyncapi(prefix, examples()),
        "command": command_schema(),
        "outcome": outcome_schema(),
    }
    return {which: json.dumps(each, indent=2, ensure_ascii=False) + "\n" for which, each in made.items()}


def examples() -> Examples:
    """Real messages of a demo, shipped with the package."""
    from worker.core.contract import Example, Examples

    kept = json.loads((files("worker") / "contract" / "examples.json").read_text(encoding="utf-8"))
    return Examples(**{kind: [Example(**each) for each in found] for kind, found in kept.items()})
