"""How the gateway behaves: frozen values, also readable from JSON (`Script.parse`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

EXPIRES_IN: Final = ("string", "int", "datetime", "absent")


Signed = float
"""A number that may be negative."""


class ScriptError(ValueError):
    """A script that cannot be played. One line: where in the script, and what is wrong."""


class _FromJson:
    """What is read from a JSON object whose keys are the names of the fields."""

    __slots__ = ()

    @classmethod
    def parse(cls, raw: object, where: str = "") -> Self:
        """Raises `ScriptError`, also for unknown keys and for a missing one that has no default. ``where`` in the
        script it is: by default the name of its kind."""
        where = where or cls.__name__.lower()
        given = _object(raw, where)
        known = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]  # each heir is a dataclass
        if unknown := [key for key in given if key not in known]:
            raise ScriptError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
        needed = (key for key, each in known.items() if each.default is MISSING and each.default_factory is MISSING)
        if missing := [key for key in needed if key not in given]:
            raise ScriptError(f"{where}: {missing[0]} is missing")
        kinds = {key: str(each.type).removesuffix(" | None") for key, each in known.items()}
        values = {key: _READERS[kinds[key]](value, f"{where}.{key}") for key, value in given.items()}
        try:
            return cls(**values)
        except ScriptError as error:
            raise ScriptError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True)
class Fault(_FromJson):
    """What one call gets instead of plain success. An empty one is plain success.

    At most one of `code`, `html`, `body`, `hang` and `reset` says what comes back. The checks (headers,
    token, signature, external id, body) come first: a call that fails them gets their refusal and uses up no
    fault.

    `code`, `message`   a SNAP answer; its HTTP status is the code's first three digits, or else `http`
    `html`              this HTTP status with a page, as from a proxy or firewall
    `body`              these bytes with status `http` (200)
    `hang`              seconds without any answer, then the connection closes
    `reset`             a TCP reset; `before`: nothing took effect, not even the external id;
                        `after`: the call took effect
    `latency`           seconds before the answer (or the reset); what takes effect has done so on arrival
    `trickle`           seconds between the bytes of the answer, headers included
    `retry_after`       value of the Retry-After header
    `challenge`         value of the WWW-Authenticate header
    `close`             the connection closes after the answer, announced by Connection: close
    `applied`           whether the bill counts as expired (of the token service: whether a token is issued);
                        by default after a success code, plain success and a reset `after`
    `repeat`            in a sequence: stay here for ever
    """

    code: str | None = None
    message: str | None = None
    http: int | None = None
    latency: float = 0.0
    hang: float = 0.0
    reset: str | None = None
    html: int | None = None
    body: str | None = None
    retry_after: str | None = None
    challenge: str | None = None
    trickle: float = 0.0
    close: bool = False
    applied: bool | None = None
    repeat: bool = False

    def __post_init__(self) -> None:
        hang = self.hang if self.hang > 0 else None
        given = {"code": self.code, "html": self.html, "body": self.body, "hang": hang, "reset": self.reset}
        kinds = [name for name, value in given.items() if value is not None]
        if len(kinds) > 1:
            raise ScriptError(f"a fault has one kind of answer, not {' and '.join(kinds)}")
        if min(self.latency, self.hang, self.trickle) < 0:
            raise ScriptError("latency, hang and trickle must not be negative")
        if self.code is not None and not re.fullmatch(r"[2-5]\d{6}", self.code):
            raise ScriptError(f"code {self.code!r} is not a response code of 7 digits")
        if self.message is not None and self.code is None:
            raise ScriptError("message needs a code")
        if self.http is not None and self.code is None and self.body is None:
            raise ScriptError("http needs a code or a body")
        if self.reset not in (None, "before", "after"):
            raise ScriptError(f"reset is 'before' or 'after', not {self.reset!r}")
        if any(status is not None and not 200 <= status <= 599 for status in (self.http, self.html)):
            raise ScriptError("an HTTP status lies between 200 and 599")
        for name, value in (("retry_after", self.retry_after), ("challenge", self.challenge)):
            if value is not None and not re.fullmatch(r"[ -~]*", value):
                raise ScriptError(f"{name} holds printable ASCII characters only")

    @property
    def takes_effect(self) -> bool:
        """Whether the call did what it asked for, whatever the caller hears."""
        if self.applied is not None:
            return self.applied
        if self.code is not None:
            return self.code.startswith("200")
        return self.reset != "before" and self.html is None and self.body is None and not self.hang

    @property
    def label(self) -> str:
        """The key under which a report counts it; empty for plain success."""
        if self.code is not None:
            return self.code
        if self.reset is not None:
            return f"reset {self.reset}"
        if self.hang:
            return "hang"
        if self.html is not None or self.body is not None:
            return f"http {self.html or self.http or 200}"
        return ""


NORMAL: Final = Fault()


@dataclass(frozen=True, slots=True)
class Pattern(_FromJson):
    """Faults for every bill in which the regular expression `match` is found, each bill from the start."""

    match: str
    faults: tuple[Fault, ...]

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ScriptError(f"match {self.match!r} is no regular expression: {error}") from None
        _check_sequence(self.faults)


@dataclass(frozen=True, slots=True)
class Rate(_FromJson):
    """One fault for a share (0 to 1) of the calls, chosen by a hash of the script's seed and external id."""

    share: float
    fault: Fault

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ScriptError("share lies between 0 and 1")


@dataclass(frozen=True, slots=True)
class Script(_FromJson):
    """How the gateway behaves. The default behaves well.

    A bill named in `bills` follows that list, one fault per call, then normal; another the first of
    `patterns` that fits; only a bill in neither can be hit by `rates`, whose shares add up to at most 1.

    `token_faults`         the same kind of list for calls of the token service
    `seed`                 of the choice by `rates`
    `down`                 every connection is reset once it has asked for anything but `/_simulator/`
    `latency`              seconds added to every answer of both services
    `requests_per_second`  more expire calls than this in a second get 4299300 with Retry-After; 0: no limit
    `single_token`         a new token kills the old ones
    `dead_token`           what a call with a token that is not valid gets; by default 4019301
    `token_lifetime`       seconds a new token lives
    `kill_token_every`     after each so many expire calls with a valid token, all tokens become invalid; 0: never
    `expires_in`           how the lifetime is reported: `string`, `int` (whole seconds), `datetime`, `absent`
    `skew`                 seconds that X-TIMESTAMP may differ from the gateway's clock
    `clock_offset`         seconds the gateway's clock is ahead of this machine's (negative: behind): the Date
                           header, the skew check and the day of external ids follow it
    `already`              response code for a bill that had expired before; by default success again
    """

    bills: Mapping[str, tuple[Fault, ...]] = field(default_factory=dict)
    patterns: tuple[Pattern, ...] = ()
    rates: tuple[Rate, ...] = ()
    token_faults: tuple[Fault, ...] = ()
    seed: int = 1
    down: bool = False
    latency: float = 0.0
    requests_per_second: float = 0.0
    single_token: bool = False
    dead_token: Fault | None = None
    token_lifetime: float = 900.0
    kill_token_every: int = 0
    expires_in: str = "string"
    skew: float = 300.0
    clock_offset: Signed = 0.0
    already: str | None = None

    def __post_init__(self) -> None:
        for faults in (self.token_faults, *self.bills.values()):
            _check_sequence(faults)
        if sum(rate.share for rate in self.rates) > 1 + 1e-9:
            raise ScriptError("the shares of rates add up to more than 1")
        if min(self.latency, self.requests_per_second, self.token_lifetime, self.kill_token_every) < 0:
            raise ScriptError("seconds, rates and counts must not be negative")
        if self.expires_in not in EXPIRES_IN:
            raise ScriptError(f"expires_in is one of {', '.join(EXPIRES_IN)}, not {self.expires_in!r}")
        if self.already is not None:
            Fault(code=self.already)

    @classmethod
    def load(cls, path: Path) -> Script:
        """A script from a JSON file. Raises ScriptError; OSError when the file cannot be read."""
        try:
            return cls.parse(json.loads(path.read_bytes()))
        except ScriptError as error:
            raise ScriptError(f"{path}: {error}") from None
        except ValueError as error:
            raise ScriptError(f"{path}: no JSON: {error}") from None


_TYPE_NAMES: Final = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}


def _wrong(value: object, wanted: str, where: str) -> ScriptError:
    return ScriptError(f"{where}: wanted {wanted}, found {_TYPE_NAMES.get(type(value), 'number')}")


def _kind(kind: type, wanted: str) -> Callable[[object, str], Any]:
    def read(value: object, where: str) -> Any:
        if not isinstance(value, kind):
            raise _wrong(value, wanted, where)
        return value

    return read


_object: Final = _kind(dict, "an object")
_list: Final = _kind(list, "a list")


def _signed(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise _wrong(value, "a number", where)
    return float(value)


def _number(value: object, where: str) -> float:
    number = _signed(value, where)
    if not 0 <= number < float("inf"):
        raise ScriptError(f"{where}: must not be negative or infinite")
    return number


def _integer(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(value, "a whole number", where)
    if value < 0:
        raise ScriptError(f"{where}: must not be negative")
    return value


def _list_of(kind: type[_FromJson]) -> Callable[[object, str], Any]:
    def read(value: object, where: str) -> tuple[_FromJson, ...]:
        return tuple(kind.parse(item, f"{where}[{at}]") for at, item in enumerate(_list(value, where)))

    return read


def _bills(value: object, where: str) -> dict[str, Any]:
    return {bill: _list_of(Fault)(faults, f"{where}.{bill}") for bill, faults in _object(value, where).items()}


_READERS: Final[Mapping[str, Callable[[object, str], Any]]] = {
    "str": _kind(str, "text"),
    "int": _integer,
    "float": _number,
    "Signed": _signed,
    "bool": _kind(bool, "true or false"),
    "Fault": Fault.parse,
    "tuple[Fault, ...]": _list_of(Fault),
    "tuple[Pattern, ...]": _list_of(Pattern),
    "tuple[Rate, ...]": _list_of(Rate),
    "Mapping[str, tuple[Fault, ...]]": _bills,
}
"""What reads a field, by its type as it is written above, without None."""


def _check_sequence(faults: Sequence[Fault]) -> None:
    if any(fault.repeat for fault in faults[:-1]):
        raise ScriptError("nothing comes after a fault with repeat")


PLAIN: Final = Script()
