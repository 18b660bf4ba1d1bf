"""The contract's documents: the code's own words, true of real messages, and never narrower than what was released.

``released/`` holds the two schemas as consumers and producers first got them; a compatible change may replace them, at
a release. What breaks them needs another major version: another ``type`` of outcomes beside the old one.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, get_type_hints

import jsonschema
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.builders import BILL, MERCHANT, NOON
from tests.contract.compatibility import Schema, breaks_consumers, breaks_producers
from tests.contract.documents import EXAMPLES, PREFIX, REFRESH, SHIPPED
from worker.cli.contract import FILES, documents, examples
from worker.core.command import IDENTIFIER, MAX_REFERENCE, RFC3339, Command, parse
from worker.core.contract import asyncapi, command_schema, outcome_schema
from worker.core.delivery import BATCH_ID, MAX_BATCH_ID, MAX_EXTERNAL_IDS
from worker.core.lanes import LANES
from worker.core.outcome import REASONS, STATUS_OF, Outcome, Reason, Status, encode_outcome
from worker.core.topology import topology
from worker.core.verdict import KNOWN

RELEASED = Path(__file__).parent / "released"
UUID = "0b6d2f0c-7f43-5d1e-9a55-1c8e4d2b7a90"


def _pattern(_: Any, pattern: str, value: object, __: Any) -> Iterator[jsonschema.ValidationError]:
    """As ECMA-262 has it, which JSON Schema prescribes: ``$`` is the very end, and not before a newline at the end."""
    if isinstance(value, str) and not re.search(pattern.removesuffix("$") + r"\Z", value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _pattern})
COMMAND = Validator(command_schema())
OUTCOME = Validator(outcome_schema())


# --- the documents are the code's


@pytest.mark.parametrize("document", FILES)
def test_shipped_document_is_what_the_code_says(document: str) -> None:
    """The files of the package are made from the code as it is."""

    assert (SHIPPED / FILES[document]).read_text() == documents(PREFIX)[document], REFRESH


@pytest.mark.parametrize("schema", [command_schema(), outcome_schema()], ids=["command", "outcome"])
def test_schema_is_one(schema: Schema) -> None:
    """Both are schemas of the dialect that they name."""

    jsonschema.Draft202012Validator.check_schema(schema)


def test_names_are_the_topologys() -> None:
    """The AsyncAPI document names exchanges and queues that are declared, with their types."""

    made = topology(PREFIX, "quorum", ())
    bindings = [channel["bindings"]["amqp"] for channel in asyncapi(PREFIX, examples())["channels"].values()]

    exchanges = {(each["exchange"]["name"], each["exchange"]["type"]) for each in bindings if "exchange" in each}
    assert exchanges <= {(each.name, each.type) for each in made.exchanges}
    assert {each["queue"]["name"] for each in bindings if "queue" in each} <= {each.name for each in made.queues}


def test_names_are_public() -> None:
    """Exchanges, routing keys, queue, the type of outcomes and the headers are what producers and consumers use."""

    document = asyncapi(PREFIX, examples())
    channels, messages = document["channels"], document["components"]["messages"]
    bindings = {name: channel["bindings"]["amqp"] for name, channel in channels.items()}

    assert bindings["commands"]["exchange"]["name"] == "qris.expire.commands"
    assert bindings["outcomes"]["exchange"]["name"] == "qris.expire.outcomes"
    assert bindings["deadLetters"]["queue"]["name"] == "qris.expire.dead"
    assert channels["commands"]["parameters"]["lane"]["enum"] == ["cancellation", "sweep"]
    assert channels["outcomes"]["address"] == "{lane}.{status}"
    assert messages["outcome"]["bindings"]["amqp"]["messageType"] == "qris.expire.outcome.v1"
    assert {name: set(message["headers"]["properties"]) for name, message in messages.items()} == {
        "command": {"batch-id", "traceparent"},
        "outcome": {"batch-id", "traceparent"},
        "deadLetter": {"dead-reason", "dead-detail", "dead-at", "dead-lane", "attempts", "last-response-code"},
    }


# --- the schema of commands and the parser agree

_NEAR_TIMES = st.from_regex(RFC3339.replace("[0-9]{4}", "20[0-9]{2}"), fullmatch=True) | st.from_regex(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]*)?([Zz]|[+-][0-9]{2}:?[0-9]{2})?",
    fullmatch=True,
)
_TIMES = _NEAR_TIMES | st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)
_IDENTIFIERS = st.from_regex(IDENTIFIER, fullmatch=True)
_ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
_LINES = _IDENTIFIERS.map(lambda text: f"{text}\n")


def _mostly(*good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(*good, *good, *good, _LINES, _ANYTHING)


_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "billnumber": _mostly(_IDENTIFIERS, st.integers(0, 70).map("7".__mul__)),
    "billNumber": _mostly(_IDENTIFIERS, st.none()),
    "additionalInfo": _mostly(
        st.fixed_dictionaries({}, optional={"merchantId": _mostly(_IDENTIFIERS), "more": _ANYTHING})
    ),
    "reference": _mostly(st.integers(0, MAX_REFERENCE + 9).map("é".__mul__), st.text()),
    "notAfter": _mostly(_TIMES),
    "unknown": _ANYTHING,
}
_CHANGES = st.sampled_from(sorted(_FIELDS)).flatmap(lambda name: st.tuples(st.just(name), _FIELDS[name]))
_NEARLY_VALID = st.lists(_CHANGES, max_size=2).map(lambda changes: {"billnumber": BILL} | dict(changes))
_BODIES: st.SearchStrategy[Any] = st.one_of(
    _NEARLY_VALID, _NEARLY_VALID, st.fixed_dictionaries({}, optional=_FIELDS), _ANYTHING
)


def _beyond_the_schema(value: Any) -> bool:
    """What the schema's ``$comment`` says that it cannot say. (Keys twice are no JSON value's matter.)"""
    if not isinstance(value, dict):
        return False
    bills = [value[name] for name in ("billnumber", "billNumber") if value.get(name) is not None]
    if len(bills) == 2 and bills[0] != bills[1]:
        return True
    try:
        date.fromisoformat(str(value.get("notAfter", "2026-11-22"))[:10])
    except ValueError:
        return value.get("notAfter") is not None
    return False


@given(_BODIES)
@example({"billnumber": BILL, "additionalInfo": {"merchantId": MERCHANT}, "notAfter": "2026-11-22T23:59:60Z"})
@example({"billnumber": BILL, "notAfter": "2026-11-22T24:00:00Z"})
@example({"billnumber": BILL, "notAfter": "2026-11-22T12:00:00+24:00"})
@example({"billnumber": f"{BILL}\n"})
@example({"billnumber": "", "billNumber": BILL})
@example({"billnumber": BILL, "billNumber": None, "additionalInfo": None, "reference": None, "notAfter": None})
@example({"billnumber": 10092081})
@example({"billnumber": BILL, "additionalInfo": []})
@example({"billnumber": BILL, "reference": "x" * MAX_REFERENCE})
@example({"billnumber": BILL, "reference": "x" * (MAX_REFERENCE + 1)})
@example({"billnumber": "7" * 64})
@example({"billnumber": "7" * 65})
def test_parser_and_schema_agree(value: Any) -> None:
    """The parser takes exactly what the schema lets through, save what the schema says that it cannot say."""

    # The ends of the calendar, where an offset decides whether the time exists at all.
    assume(not isinstance(value, dict) or str(value.get("notAfter"))[:4] not in ("0001", "9999"))
    parsed = isinstance(parse(json.dumps(value).encode(), default_merchant=MERCHANT), Command)

    assert parsed == (COMMAND.is_valid(value) and not _beyond_the_schema(value))


@given(_BODIES)
def test_schema_lets_every_command_through(value: Any) -> None:
    """No producer that validates is stricter than the worker."""

    if isinstance(parse(json.dumps(value).encode(), default_merchant=MERCHANT), Command):
        COMMAND.validate(value)


@pytest.mark.parametrize("pattern", [IDENTIFIER, RFC3339])
def test_patterns_are_of_the_common_syntax(pattern: str) -> None:
    r"""No lookaround, named group, \d or possessive quantifier: ECMA-262, RE2 and Python read them alike."""

    assert not re.search(r"\(\?[^:]|\\[^.]|[*+?}]\+", pattern)


# --- the schema of outcomes and the encoder agree

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_OUTCOMES = st.builds(
    Outcome,
    outcome_id=st.uuids().map(str),
    command_id=_TEXTS,
    lane=st.sampled_from(LANES),
    billnumber=st.none() | _IDENTIFIERS,
    merchant_id=st.none() | _IDENTIFIERS,
    reference=st.none() | _TEXTS,
    batch_id=st.none() | st.text(max_size=MAX_BATCH_ID),
    reason=st.sampled_from(Reason),
    response_code=st.none() | st.from_regex("[2-5][0-9]{6}", fullmatch=True),
    response_message=st.none() | _TEXTS,
    detail=st.none() | _TEXTS,
    attempts=st.integers(0, 2**40),
    external_ids=st.lists(st.from_regex("[0-9]{36}", fullmatch=True), max_size=MAX_EXTERNAL_IDS).map(tuple),
    effect_unknown=st.booleans(),
    received_at=st.floats(0, 4e9),
    completed_at=st.floats(0, 4e9),
)


@given(_OUTCOMES)
def test_every_outcome_fits_its_schema(outcome: Outcome) -> None:
    """Whatever the encoder writes is valid, and the schema knows every field of it and no other."""

    told = json.loads(encode_outcome(outcome))

    OUTCOME.validate(told)
    assert told.keys() == outcome_schema()["properties"].keys()


def _encoded() -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(encode_outcome(_an_outcome()))
    return whole


def _an_outcome(reason: Reason = Reason.SUCCESS) -> Outcome:
    return Outcome(UUID, "m-1", "sweep", BILL, MERCHANT, None, None, reason, None, None, None, 1, (), False, NOON, NOON)


@given(st.sampled_from(sorted(_encoded())), _ANYTHING)
def test_other_types_do_not_fit(name: str, value: Any) -> None:
    """A field with a value of a type that the model does not have is refused."""

    hints = {re.sub("_(.)", lambda m: m[1].upper(), each): hint for each, hint in get_type_hints(Outcome).items()}
    allowed = {"externalIds": list, "receivedAt": str, "completedAt": str}.get(name, hints.get(name, str))
    assume(not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool))
    assume(not (allowed is int and isinstance(value, float)))  # 1.0 is an integer in JSON

    assert not OUTCOME.is_valid({**_encoded(), name: value})


@pytest.mark.parametrize("reason", Reason)
def test_reason_belongs_to_its_status(reason: Reason) -> None:
    """A status with a reason of another one is refused."""

    told = json.loads(encode_outcome(_an_outcome(reason)))

    assert OUTCOME.is_valid(told)
    for status in Status:
        assert OUTCOME.is_valid({**told, "status": str(status)}) == (STATUS_OF[reason] is status)


@pytest.mark.parametrize("name", sorted(_encoded()))
def test_no_field_is_missing(name: str) -> None:
    """Every field is always there: consumers need no defaults."""

    told = _encoded()
    del told[name]

    assert not OUTCOME.is_valid(told)


# --- the examples are real messages


def test_examples_are_true() -> None:
    """Commands are valid and taken, outcomes are valid, and a dead letter has the reason of its outcome."""

    kept = json.loads(EXAMPLES.read_text())

    for each in kept["commands"]:
        COMMAND.validate(each["payload"])
        assert isinstance(parse(json.dumps(each["payload"]).encode()), Command)
    for each in kept["outcomes"]:
        OUTCOME.validate(each["payload"])
        assert each["payload"]["reason"] == each["name"]
    assert {each["headers"]["dead-reason"] for each in kept["dead_letters"]} == {
        each["name"] for each in kept["outcomes"] if each["payload"]["status"] in (Status.UNRESOLVED, Status.INVALID)
    }
    assert {each["payload"]["status"] for each in kept["outcomes"]} == set(map(str, REASONS))


def test_examples_fit_their_headers() -> None:
    """The headers of the examples are those that the document describes."""

    messages = asyncapi(PREFIX, examples())["components"]["messages"]

    for message in messages.values():
        assert message["examples"]
        for each in message["examples"]:
            Validator(message["headers"]).validate(each["headers"])
    assert BATCH_ID in messages["command"]["headers"]["properties"]


# --- AsyncAPI's own schema


@pytest.fixture(scope="module")
def specification(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    """AsyncAPI 3.0 as a JSON Schema, from the package that its authors publish."""
    npm = shutil.which("npm")
    directory = tmp_path_factory.mktemp("asyncapi")
    if npm is None:
        pytest.skip("AsyncAPI's own schema was NOT checked: no npm here")
    packed = subprocess.run(
        [npm, "pack", "--silent", "@asyncapi/specs@6"], cwd=directory, capture_output=True, timeout=60, check=False
    )
    if packed.returncode != 0:
        pytest.skip("AsyncAPI's own schema was NOT checked: npm cannot fetch @asyncapi/specs")
    (archive,) = directory.glob("*.tgz")
    with tarfile.open(archive) as files:
        member = files.extractfile("package/schemas/3.0.0.json")
        assert member is not None
        schema: Schema = json.load(member)
    return schema


def test_document_is_asyncapi(specification: Schema) -> None:
    """The document is valid AsyncAPI 3.0, and one that is not is found out."""

    validator = jsonschema.Draft7Validator(specification)
    document = asyncapi(PREFIX, examples())

    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)] == []
    document["channels"]["commands"]["nonsense"] = 1
    assert not validator.is_valid(document)


# --- compatibility with what was released


def released(name: str) -> Schema:
    schema: Schema = json.loads((RELEASED / f"{name}.schema.json").read_text())
    return schema


def test_no_producer_is_broken() -> None:
    """Every command that was valid when it was released still is."""

    assert breaks_producers(released("command"), command_schema()) == []


def test_no_consumer_is_broken() -> None:
    """Outcomes are still what was promised when they were released."""

    assert breaks_consumers(released("outcome"), outcome_schema()) == []


Change = Callable[[Schema], None]


def _set(*path: str, **rules: Any) -> Change:
    def change(schema: Schema) -> None:
        for name in path:
            schema = schema["properties"][name]
        schema.update(rules)

    return change


def _unset(name: str, rule: str) -> Change:
    return lambda schema: schema["properties"][name].pop(rule)


def _remove(name: str) -> Change:
    def change(schema: Schema) -> None:
        del schema["properties"][name]
        if name in schema.get("required", ()):
            schema["required"].remove(name)

    return change


def _grow(name: str) -> Change:
    return lambda schema: schema["properties"][name]["enum"].append("another")


def _require(name: str) -> Change:
    return lambda schema: schema.setdefault("required", []).append(name)


def _no_longer_required(name: str) -> Change:
    return lambda schema: schema["required"].remove(name)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_remove("reference"), id="a field is removed"),
        pytest.param(_require("reference"), id="a field becomes required"),
        pytest.param(_set("reference", type="string"), id="null is taken no more"),
        pytest.param(_set("reference", maxLength=64), id="a limit is lower"),
        pytest.param(_set("reference", enum=["a", "b"]), id="values are enumerated"),
        pytest.param(_set("reference", minLength=1), id="a lower limit appears"),
        pytest.param(_set("billnumber", pattern="^[0-9]+$"), id="a pattern is another one"),
        pytest.param(_set("additionalInfo", "merchantId", type=["integer", "null"]), id="a type inside is another one"),
        pytest.param(_set("additionalInfo", required=["merchantId"]), id="a field inside becomes required"),
        pytest.param(_set("reference", dependentRequired={}), id="a rule that nobody can compare"),
        pytest.param(lambda schema: schema["anyOf"].pop(), id="an alternative is gone"),
        pytest.param(lambda schema: schema.update(additionalProperties=False), id="unknown fields are refused"),
    ],
)
def test_breaking_change_of_commands_is_found(change: Change) -> None:
    """Each way to refuse what producers send is reported."""

    new = copy.deepcopy(released("command"))
    change(new)

    assert breaks_producers(released("command"), new)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_remove("externalIds"), id="a field is removed"),
        pytest.param(_no_longer_required("detail"), id="a field may be missing"),
        pytest.param(_set("attempts", type=["integer", "null"]), id="null may come"),
        pytest.param(_set("attempts", type="string"), id="a type is another one"),
        pytest.param(_grow("status"), id="a status is new"),
        pytest.param(_grow("reason"), id="a reason is new"),
        pytest.param(_unset("lane", "enum"), id="values are no longer enumerated"),
        pytest.param(_set("externalIds", maxItems=100), id="more may come"),
        pytest.param(_set("externalIds", items={"type": "integer"}), id="items are of another type"),
        pytest.param(_set("reference", maxLength=1000), id="longer texts may come"),
        pytest.param(_unset("receivedAt", "pattern"), id="a form is no longer promised"),
        pytest.param(lambda schema: schema.pop("oneOf"), id="reasons no longer belong to a status"),
    ],
)
def test_breaking_change_of_outcomes_is_found(change: Change) -> None:
    """Each way to tell consumers what they were not prepared for is reported."""

    new = copy.deepcopy(released("outcome"))
    change(new)

    assert breaks_consumers(released("outcome"), new)


@pytest.mark.parametrize("of", [breaks_producers, breaks_consumers])
def test_compatible_changes_pass(of: Callable[[Schema, Schema], list[str]]) -> None:
    """Other words and a new field break nobody; commands may be accepted more freely, outcomes be narrower."""

    name = "command" if of is breaks_producers else "outcome"
    new = copy.deepcopy(released(name))
    new["description"] = "Other words."
    new["properties"]["addition"] = {"type": "string"}
    _set("reference", maxLength=256 if name == "command" else 64)(new)

    assert of(released(name), new) == []


# -- the gateway's facts -----------------------------------------------------------------------------------------------

GATEWAY_API = SHIPPED / "gateway-api.md"


def test_sections_that_the_code_cites_exist() -> None:
    """Docstrings and comments cite *gateway-api* as the source of a rule, with a section: it is shipped, and has it."""
    sections = set(re.findall(r"^## (\d)\.", GATEWAY_API.read_text(), re.MULTILINE))
    code = "\n".join(path.read_text() for path in (SHIPPED.parent).rglob("*.py"))
    cited = re.findall(r"gateway-api,?\s+sections?\s+(\d)", code)

    assert len(cited) == code.count("gateway-api")
    assert set(cited) <= sections


def test_codes_of_the_gateway_s_document_are_known() -> None:
    """Each is in the table of verdicts, and so in the metrics and in the simulator."""
    first = GATEWAY_API.read_text().partition("## 2.")[0]

    assert set(re.findall(r"^\| (\d{7}) \|", first, re.MULTILINE)) <= set(KNOWN)
