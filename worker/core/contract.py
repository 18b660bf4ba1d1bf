"""The contract as documents: JSON Schemas of command and outcome, and AsyncAPI for who sends what where.

They are made from what the parser, the encoder and the topology themselves use: patterns and limits of commands, fields
and types of `Outcome`, reasons by status, names. What a schema cannot say is in its ``$comment``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Final, NamedTuple, get_args, get_origin, get_type_hints

from worker.core.command import IDENTIFIER, MAX_BODY_BYTES, MAX_DETAIL, MAX_REFERENCE, RFC3339
from worker.core.delivery import CARRIED_HEADERS, MAX_BATCH_ID, MAX_EXTERNAL_IDS
from worker.core.lanes import LANES
from worker.core.outcome import DEAD_LETTERED, OUTCOME_TYPE, REASONS, Outcome, Reason, Status
from worker.core.request import EXTERNAL_ID_DIGITS
from worker.core.topology import Names
from worker.core.verdict import MAX_MESSAGE

VERSION: Final = "1.0.0"
"""Of the contract, not of the package. The first number is the one in the outcome's ``type``."""

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


class Example(NamedTuple):
    """A message as it was seen. ``payload`` is the JSON of its body, or the text if it is not JSON."""

    name: str
    summary: str
    headers: Mapping[str, Any]
    payload: Any


class Examples(NamedTuple):
    """What the AsyncAPI document shows."""

    commands: Sequence[Example] = ()
    outcomes: Sequence[Example] = ()
    dead_letters: Sequence[Example] = ()


# --- command --------------------------------------------------------------------------------------------------------


def command_schema() -> Schema:
    """What `worker.core.command.parse` takes."""
    return {
        "$schema": DIALECT,
        "$id": "urn:qris-expire:command:v1",
        "title": "Command",
        "description": f"Expire the QRIS code of one bill. JSON in UTF-8, at most {MAX_BODY_BYTES:,} bytes. "
        "The body of the gateway's own service is a valid command. Unknown fields are ignored, null is absent.",
        "$comment": "Beyond this schema: no object names a key twice; billnumber and billNumber are equal where both "
        "are given; notAfter is a day that exists.",
        "type": "object",
        "properties": {
            "billnumber": _identifier("The bill: a string, since a number loses its leading zeros."),
            "billNumber": _identifier("The same in the spelling of some clients."),
            "additionalInfo": {
                "type": ["object", "null"],
                "properties": {
                    "merchantId": _identifier(
                        "The bill's merchant. May only be left out where the worker has GATEWAY_MERCHANT_ID."
                    )
                },
            },
            "reference": {
                "description": "Yours; the outcome has it, too.",
                "type": ["string", "null"],
                "maxLength": MAX_REFERENCE,
            },
            "notAfter": {
                "description": "RFC 3339. After it no call starts: unresolved, deadline_passed.",
                "type": ["string", "null"],
                "format": "date-time",
                "pattern": _whole(RFC3339),
            },
        },
        "anyOf": [
            {"required": [name], "properties": {name: {"type": "string"}}} for name in ("billnumber", "billNumber")
        ],
    }


def _identifier(description: str) -> Schema:
    return {"description": description, "type": ["string", "null"], "pattern": _whole(IDENTIFIER)}


def _whole(pattern: str) -> str:
    return f"^{pattern}$" if "|" not in pattern else f"^(?:{pattern})$"


# --- outcome --------------------------------------------------------------------------------------------------------

_TIME: Final[Schema] = {
    "format": "date-time",
    "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}\+07:00$",
}
_UUID: Final = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"

_MEANING: Final[Mapping[str, Schema]] = {
    "outcome_id": {
        "description": "The same for every redelivery of the same command (its id, lane and body) with the same "
        "status: drop what you know. Also the message_id.",
        "format": "uuid",
        "pattern": _UUID,
    },
    "command_id": {"description": "The command's message_id; where it had none, a UUID made from its body."},
    "lane": {"description": "The lane it came by.", "enum": list(LANES)},
    "billnumber": {"description": "Null where none could be read.", "pattern": _whole(IDENTIFIER)},
    "merchant_id": {"description": "Null for what is invalid.", "pattern": _whole(IDENTIFIER)},
    "reference": {"description": "The command's own.", "maxLength": MAX_REFERENCE},
    "batch_id": {"description": "The sweep, from the header batch-id.", "maxLength": MAX_BATCH_ID},
    "reason": {"description": "Why it ended so. Each belongs to one status.", "enum": list(map(str, Reason))},
    "response_code": {
        "description": "The gateway's last: HTTP status (3 digits), service (2), case (2); null where it gave none.",
        "maxLength": 7,
    },
    "response_message": {"description": "The gateway's words with that code.", "maxLength": MAX_MESSAGE},
    "detail": {"description": "For people, where the code does not tell it all.", "maxLength": MAX_DETAIL},
    "attempts": {"description": "Expire calls sent for the command, in all rounds.", "minimum": 0},
    "external_ids": {
        "description": f"X-EXTERNAL-ID of those calls, at most the latest {MAX_EXTERNAL_IDS}.",
        "items": {"type": "string", "pattern": f"^[0-9]{{1,{EXTERNAL_ID_DIGITS}}}$"},
        "maxItems": MAX_EXTERNAL_IDS,
    },
    "effect_unknown": {"description": "Whether a call may have taken effect without an answer that says so."},
    "received_at": {"description": "When the worker first had the command.", **_TIME},
    "completed_at": {"description": "When it ended.", **_TIME},
}

_JSON_TYPES: Final[Mapping[Any, str]] = {
    str: "string",
    Reason: "string",
    float: "string",  # seconds inside, RFC 3339 outside
    int: "integer",
    bool: "boolean",
    tuple: "array",
    NoneType: "null",
}


def outcome_schema() -> Schema:
    """What `core.outcome.encode_outcome` writes. Raises KeyError for a field of `Outcome` of which nothing is said."""
    own = {
        re.sub(r"_(.)", lambda found: found[1].upper(), name): {"type": _types(annotation), **_MEANING[name]}
        for name, annotation in get_type_hints(Outcome).items()
    }
    derived = {"description": "The end of the command.", "type": "string", "enum": list(map(str, Status))}
    properties = own | {"status": derived}
    return {
        "$schema": DIALECT,
        "$id": "urn:qris-expire:outcome:v1",
        "title": "Outcome",
        "description": "What became of a command. `expired` means no new scans; a payment made a moment before can "
        "still be reported. Fields may be added within v1: ignore what you do not know.",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "oneOf": [
            {"properties": {"status": {"const": str(status)}, "reason": {"enum": list(map(str, reasons))}}}
            for status, reasons in REASONS.items()
        ],
    }


def _types(annotation: Any) -> str | list[str]:
    if get_origin(annotation) is UnionType:
        return [_JSON_TYPES[each] for each in get_args(annotation)]
    return _JSON_TYPES[get_origin(annotation) or annotation]


# --- asyncapi -------------------------------------------------------------------------------------------------------

_BINDING_VERSION: Final = {"bindingVersion": "0.3.0"}


def asyncapi(prefix: str, examples: Examples) -> Schema:
    """AsyncAPI 3.0, from the worker's side: it receives commands, sends outcomes and parks dead letters."""
    names = Names(prefix)
    return {
        "asyncapi": "3.0.0",
        "id": "urn:qris-expire",
        "info": {
            "title": "QRIS Expire Billnumber worker",
            "version": VERSION,
            "description": "Takes *expire this bill* commands, calls the payment gateway, and tells what happened. "
            "Every command gets an outcome, or is still in a queue, or in the dead letters.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "broker": {
                "host": "localhost:5672",
                "protocol": "amqp",
                "protocolVersion": "0-9-1",
                "description": "RabbitMQ; the worker's AMQP_URL.",
            }
        },
        "channels": _channels(names),
        "operations": _operations(),
        "components": {"messages": _messages(examples)},
    }


def _channels(names: Names) -> Schema:
    return {
        "commands": {
            "address": "{lane}",
            "title": "Commands",
            "description": f"Publish to the exchange `{names.commands}`, mandatory and with confirms; the routing key "
            "is the lane.",
            "parameters": {
                "lane": _parameter(LANES, "cancellation is real time; sweep is for bulk, and waits for it.")
            },
            "messages": {"command": {"$ref": "#/components/messages/command"}},
            "bindings": _exchange(names.commands, "direct"),
        },
        "outcomes": {
            "address": "{lane}.{status}",
            "title": "Outcomes",
            "description": f"Bind a queue of your own to the exchange `{names.outcomes}`, as to `cancellation.*` or "
            f"`#`. What nobody is bound to waits in the queue `{names.unrouted}`.",
            "parameters": {
                "lane": _parameter(LANES, "Of the command."),
                "status": _parameter(tuple(map(str, Status)), "As in the outcome."),
            },
            "messages": {"outcome": {"$ref": "#/components/messages/outcome"}},
            "bindings": _exchange(names.outcomes, "topic"),
        },
        "deadLetters": {
            "address": names.dead,
            "title": "Dead letters",
            "description": "Commands for people to look at; `qris-expire dead` shows and moves them.",
            "messages": {"deadLetter": {"$ref": "#/components/messages/deadLetter"}},
            "bindings": {
                "amqp": {
                    "is": "queue",
                    "queue": {"name": names.dead, "durable": True, "exclusive": False, "autoDelete": False},
                    **_BINDING_VERSION,
                }
            },
        },
    }


def _parameter(values: Sequence[str], description: str) -> Schema:
    return {"description": description, "enum": list(values)}


def _exchange(name: str, kind: str) -> Schema:
    exchange = {"name": name, "type": kind, "durable": True, "autoDelete": False}
    return {"amqp": {"is": "routingKey", "exchange": exchange, **_BINDING_VERSION}}


def _operations() -> Schema:
    sent = {"deliveryMode": 2, "mandatory": True}
    expires = "Expires the bill. Acked when the broker has confirmed the outcome."
    tells = "Tells what happened; at least once, with the same message_id each time."
    parks = "Parks what is unresolved or invalid, beside its outcome."
    return {
        "receiveCommand": _operation("receive", "commands", "command", expires, {"ack": True}),
        "sendOutcome": _operation("send", "outcomes", "outcome", tells, sent),
        "sendDeadLetter": _operation("send", "deadLetters", "deadLetter", parks, sent),
    }


def _operation(action: str, channel: str, message: str, summary: str, amqp: Schema) -> Schema:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "messages": [{"$ref": f"#/channels/{channel}/messages/{message}"}],
        "bindings": {"amqp": {**amqp, **_BINDING_VERSION}},
    }


def _messages(examples: Examples) -> Schema:
    return {
        "command": {
            "name": "command",
            "title": "Expire one bill",
            "description": "Properties: message_id is the command's identity, by which its outcome is told (absent: "
            "derived from the body); correlation_id is carried to the outcome; timestamp dates the request; "
            "delivery_mode should be 2.",
            "contentType": "application/json",
            "headers": _carried_headers(),
            "payload": _embedded(command_schema()),
            **_shown(examples.commands),
        },
        "outcome": {
            "name": "outcome",
            "title": "What became of it",
            "description": "Properties: message_id = outcomeId; correlation_id = the command's own, or its message_id; "
            f"type = {OUTCOME_TYPE}; timestamp = completedAt.",
            "contentType": "application/json",
            "headers": _carried_headers(),
            "payload": _embedded(outcome_schema()),
            "bindings": {"amqp": {"messageType": OUTCOME_TYPE, **_BINDING_VERSION}},
            **_shown(examples.outcomes),
        },
        "deadLetter": {
            "name": "deadLetter",
            "title": "A command that people have to look at",
            "description": "The command's own bytes and properties, which may be no JSON at all, with the reason in "
            "headers. What the broker parked itself, after 50 deliveries, has its x-death headers instead.",
            "headers": _dead_letter_headers(),
            "payload": {},
            **_shown(examples.dead_letters),
        },
    }


def _carried_headers() -> Schema:
    meanings = {
        "batch-id": "The sweep; the outcome's batchId.",
        "traceparent": "W3C trace context, carried as it is.",
    }
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": meanings[name]} for name in CARRIED_HEADERS},
    }


def _dead_letter_headers() -> Schema:
    reasons = [str(reason) for status in REASONS if status in DEAD_LETTERED for reason in REASONS[status]]
    return {
        "type": "object",
        "properties": {
            "dead-reason": {"type": "string", "enum": reasons, "description": "The outcome's reason."},
            "dead-detail": {"type": "string", "description": "For people."},
            "dead-at": {"type": "string", **_TIME},
            "dead-lane": {"type": "string", "enum": list(LANES)},
            "attempts": {"type": "integer", "minimum": 0, "description": "Expire calls sent for it."},
            "last-response-code": {"type": "string", "description": "Of the gateway; empty where it gave none."},
        },
    }


def _embedded(schema: Schema) -> Schema:
    """Without what names the dialect: AsyncAPI has its own, of which these schemas use what both share."""
    return {name: value for name, value in schema.items() if name not in ("$schema", "$id")}


def _shown(examples: Sequence[Example]) -> Schema:
    return {"examples": [each._asdict() for each in examples]} if examples else {}
