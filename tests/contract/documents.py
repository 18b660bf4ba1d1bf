"""The contract's documents as the package ships them, and the examples in them, taken from a demo."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from worker.cli.contract import FILES, documents
from worker.core.outcome import Status
from worker.sandbox.demo import Seen

SHIPPED: Final = Path(__file__).parents[2] / "worker" / "contract"
EXAMPLES: Final = SHIPPED / "examples.json"
PREFIX: Final = "qris.expire"
REFRESH: Final = "`python -m tests.contract` writes the documents again, and with --demo the examples as well"


def write() -> list[Path]:
    """The documents as the code has them, with the examples as they are."""
    made = {SHIPPED / FILES[which]: text for which, text in documents(PREFIX).items()}
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return list(made)


def write_examples(messages: Iterable[Seen]) -> Path:
    """The first message of every kind among ``messages``."""
    SHIPPED.mkdir(exist_ok=True)
    EXAMPLES.write_text(json.dumps(choose(list(messages)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return EXAMPLES


def choose(messages: list[Seen]) -> dict[str, list[dict[str, Any]]]:
    """For each reason an outcome, its command if that is a valid one, and its dead letter if it has one."""
    outcomes = _outcomes(messages)
    return {
        "commands": [
            _example(name, _of(messages, "command", name, outcomes))
            for name, outcome in outcomes.items()
            if json.loads(outcome.body)["status"] != Status.INVALID  # tools hold examples against the schema
        ],
        "outcomes": [_example(name, outcome) for name, outcome in outcomes.items()],
        "dead_letters": [
            _example(name, letter) for name in outcomes if (letter := _of(messages, "dead letter", name, outcomes))
        ],
    }


def _outcomes(messages: list[Seen]) -> dict[str, Seen]:
    """By reason. One that was sent twice shows more than one that went well at once."""
    told = [(json.loads(message.body), message) for message in messages if message.kind == "outcome"]
    told.sort(key=lambda pair: (pair[0]["status"], pair[0]["reason"], -min(pair[0]["attempts"], 2)))
    found: dict[str, Seen] = {}
    for fields, message in told:
        found.setdefault(fields["reason"], message)
    return found


def _of(messages: list[Seen], kind: str, name: str, outcomes: dict[str, Seen]) -> Seen | None:
    command_id = json.loads(outcomes[name].body)["commandId"]
    fitting = (m for m in messages if m.kind == kind and m.properties.get("message_id") == command_id)
    return next(fitting, None)


def _example(name: str, message: Seen | None) -> dict[str, Any]:
    assert message is not None, f"the demo has no message for {name}"
    text = message.body.decode()
    try:
        payload = json.loads(text)
    except ValueError:
        payload = text
    return {
        "name": name,
        "summary": f"{message.kind} with routing key {message.routing_key}",
        "headers": message.properties.get("headers", {}),
        "payload": payload,
    }
