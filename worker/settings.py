"""Settings from the environment and a ``.env`` file, each declared once: name, rule, default and meaning.

A group is a class, a setting a field: ``AmqpSettings.queue_type`` is ``AMQP_QUEUE_TYPE``. A field ``x_file``
beside a field ``x`` is the path of a mounted file that holds ``x``. The README's table is `reference`.
"""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar, Union, get_args, get_origin, overload
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le, MaxLen
from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from worker.core.command import is_identifier
from worker.core.topology import Names
from worker.core.urls import (
    amqp_url_problem,
    base_url_problem,
    is_host,
    is_loopback,
    is_path,
    split_amqp_urls,
)

MAX_SECRET_BYTES: Final = 65_536
"""A path that leads to a log or a device must not fill the memory."""

MAX_DELAY_SECONDS: Final = 7 * 86_400
"""A delayed round beyond a week would outlive whoever could still act on its outcome."""

MAX_DELAYS: Final = 20
"""Each delay is a queue for every lane."""


class SettingsError(Exception):
    """All that is wrong. Each problem is ``VARIABLE: what is wrong, what to do``, and holds no value."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


# --- rules: no message repeats the value, which may be a secret in the wrong variable -----------------------

_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")  # RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?\Z")
_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

_OWN_HEADERS: Final = frozenset(
    {
        "accept",
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "host",
        "transfer-encoding",
        "user-agent",
        "x-client-key",
        "x-external-id",
        "x-partner-id",
        "x-signature",
        "x-timestamp",
    }
)


def _amqp_prefix(value: str) -> str:
    if not _PREFIX.match(value):
        raise ValueError("must be letters, digits, '.', '_' and '-', beginning with a letter or digit")
    if value.startswith("amq."):
        raise ValueError("must not begin with 'amq.', which the broker keeps for itself")
    return value


def _amqp_urls(value: SecretStr) -> SecretStr:
    urls = split_amqp_urls(value.get_secret_value())
    for number, url in enumerate(urls, 1):
        problem = amqp_url_problem(url)
        if problem:
            raise ValueError(problem if len(urls) == 1 else f"URL {number} of {len(urls)} {problem}")
    return value


def _base_url(value: str) -> str:
    problem = base_url_problem(value)
    if problem:
        raise ValueError(problem)
    return value.rstrip("/")


def _url_path(value: str) -> str:
    if not is_path(value):
        raise ValueError("must be a path that begins with '/', without query or fragment")
    return value


def _host(value: str) -> str:
    if not is_host(value):
        raise ValueError("must be an address or a host name")
    return value


def _header_value(value: str) -> str:
    if not _HEADER_VALUE.match(value):
        raise ValueError("must be printable ASCII without blanks around it, since it is sent as a header")
    return value


def _header_names(value: object) -> object:
    names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
    if not isinstance(names, tuple) or not names or not all(_TOKEN.match(str(name)) for name in names):
        raise ValueError("must be names of HTTP headers, separated by commas")
    lowered = [str(name).lower() for name in names]
    if len(set(lowered)) < len(lowered):
        raise ValueError("names a header twice; name each once")
    if not _OWN_HEADERS.isdisjoint(lowered):
        raise ValueError("names a header that the worker sets itself; leave those that carry the channel id")
    return names


def _merchant(value: str) -> str:
    if not is_identifier(value):
        raise ValueError("must be 1 to 64 printable ASCII characters without blanks")
    return value


def _member(value: str) -> str:
    if not _MEMBER.match(value) or value == "additionalInfo":
        raise ValueError("must be the name of a JSON field, as billnumber or billNumber")
    return value


def _delays(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "none":
        return ()
    texts = [text.strip() for text in value.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts):
        raise ValueError("must be whole seconds separated by commas, as 30,300,1800, or none")
    return tuple(int(text) for text in texts)


def _increasing(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in zip((0, *value), value, strict=False)):
        raise ValueError("must be above 0 and increase from entry to entry")
    if value and value[-1] > MAX_DELAY_SECONDS:
        raise ValueError(f"must not go beyond {MAX_DELAY_SECONDS} seconds, a week")
    if len(value) > MAX_DELAYS:
        raise ValueError(f"must have at most {MAX_DELAYS} entries, since each is a queue for every lane")
    return value


def _readable(value: Path) -> Path:
    try:
        if value.exists() and not value.is_file():
            raise ValueError("is not a regular file; give the path of one")
        value.open("rb").close()
    except FileNotFoundError:
        raise ValueError("no such file; mount it, or correct the path") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); make it readable, or correct the path") from None
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


AmqpPrefix = Annotated[str, Field(max_length=100), AfterValidator(_amqp_prefix)]
AmqpUrls = Annotated[SecretStr, AfterValidator(_amqp_urls)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
UrlPath = Annotated[str, AfterValidator(_url_path)]
Host = Annotated[str, AfterValidator(_host)]
HeaderValue = Annotated[str, AfterValidator(_header_value)]
HeaderNames = Annotated[tuple[str, ...], BeforeValidator(_header_names)]
Merchant = Annotated[str, AfterValidator(_merchant)]
Member = Annotated[str, Field(max_length=64), AfterValidator(_member)]
Delays = Annotated[tuple[int, ...], BeforeValidator(_delays), AfterValidator(_increasing)]
ReadableFile = Annotated[Path, AfterValidator(_readable)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
QueueType = Literal["quorum", "classic"]
Signature = Literal["hmac-sha512", "rsa-sha256", "rsa-sha256-no-token"]
LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]


# --- groups -------------------------------------------------------------------------------------------------


class Group(BaseSettings):
    """Settings with one prefix. `load` makes them; called directly they take values only."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Values only: `load` alone knows how a ``_FILE`` relates to the plain form in another source."""
        return (init_settings,)

    @classmethod
    def prefix_of_variables(cls) -> str:
        """As ``AMQP_``."""
        return cls.model_config.get("env_prefix", "")

    @classmethod
    def variable(cls, name: str) -> str:
        """The name outside: ``AMQP_URL`` for ``url``."""
        return f"{cls.prefix_of_variables()}{name.upper()}"

    @classmethod
    def file_forms(cls) -> dict[str, str]:
        """Field → the field that holds the path of its mounted file."""
        return {name: f"{name}_file" for name in cls.model_fields if f"{name}_file" in cls.model_fields}

    def reread(self) -> Self:
        """The same settings with mounted secrets as they are now. Raises `SettingsError`."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.model_fields_set}
        wrong: dict[str, str] = {}
        for name, file_field in self.file_forms().items():
            if values.get(file_field) is not None:
                _read_mounted(type(self), name, values[file_field], values, wrong)
        return _build(type(self), values, wrong)


class AmqpSettings(Group):
    """The broker."""

    model_config = SettingsConfigDict(env_prefix="AMQP_")

    url: AmqpUrls = Field(
        default=SecretStr("amqp://guest:guest@localhost:5672/%2F"),
        description="One URL, or several separated by commas for the nodes of a cluster; `amqps://` for TLS.",
    )
    url_file: Path | None = Field(default=None, description="Path of a mounted file that holds `AMQP_URL`.")
    prefix: AmqpPrefix = Field(default="qris.expire", description="Prefix of every exchange and queue.")
    queue_type: QueueType = Field(default="quorum", description="`quorum`, or `classic`.")
    declare: bool = Field(
        default=True,
        description="`false`: the topology is someone else's; verify it passively, say what is missing.",
    )
    ca_file: ReadableFile | None = Field(
        default=None,
        description="CA certificates of the broker.",
        json_schema_extra={"default": "the system's"},
    )
    cert_file: ReadableFile | None = Field(default=None, description="Client certificate for mutual TLS.")
    key_file: ReadableFile | None = Field(
        default=None, validate_default=True, description="Private key of that certificate."
    )

    @field_validator("key_file")
    @classmethod
    def _pair(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "cert_file" in info.data and (value is None) != (info.data["cert_file"] is None):
            raise ValueError("goes together with AMQP_CERT_FILE; set both or neither")
        return value

    @property
    def names(self) -> Names:
        """The names of exchanges and queues."""
        return Names(self.prefix)

    def urls(self) -> list[str]:
        """The URLs in clear, passwords included: for the client library alone."""
        return split_amqp_urls(self.url.get_secret_value())


class GatewaySettings(Group):
    """The payment gateway."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_")

    allow_http: bool = Field(default=False, description="`true` allows plain http to other hosts than this one.")
    base_url: BaseUrl = Field(
        description="The gateway with its version, as `https://host/v1.0`; plain http only for loopback."
    )
    token_path: UrlPath = Field(
        default="/access-token/b2b", description="Path of the token service, after the base URL."
    )
    expire_path: UrlPath = Field(
        default="/qr/qr-mpm-expire-billnumber", description="Path of the expire service, after the base URL."
    )
    sign_path: UrlPath = Field(
        default="",
        validate_default=True,
        description="Path that is signed, where it is not the one that is called.",
        json_schema_extra={"default": "the same as `GATEWAY_EXPIRE_PATH`"},
    )
    client_id: HeaderValue = Field(description="The id given at onboarding.")
    client_secret: SecretStr = Field(description="The secret given at onboarding.")
    client_secret_file: Path | None = Field(
        default=None, description="Path of a mounted file that holds `GATEWAY_CLIENT_SECRET`."
    )
    private_key_file: ReadableFile = Field(description="PEM file of the RSA private key, PKCS#8 or PKCS#1.")
    private_key_passphrase: SecretStr | None = Field(default=None, description="Passphrase of that key, if it has one.")
    private_key_passphrase_file: Path | None = Field(
        default=None, description="Path of a mounted file that holds `GATEWAY_PRIVATE_KEY_PASSPHRASE`."
    )
    channel_id: HeaderValue = Field(description="The merchant's channel id.")
    channel_headers: HeaderNames = Field(
        default=("CHANNEL-ID", "X-CHANNEL-ID"),
        description="Headers that carry the channel id, separated by commas.",
    )
    merchant_id: Merchant | None = Field(default=None, description="Merchant of the commands that carry none.")
    signature: Signature = Field(
        default="hmac-sha512",
        description="How an expire is signed: `hmac-sha512`, `rsa-sha256` or `rsa-sha256-no-token`.",
    )
    bill_field: Member = Field(
        default="billnumber", description="Name of the bill in the gateway's body, or `billNumber`."
    )
    timestamp_milliseconds: bool = Field(
        default=True, description="`false` leaves the milliseconds out of `X-TIMESTAMP`."
    )
    connect_timeout_seconds: Seconds = Field(default=5, le=300, description="Longest wait for a connection.")
    read_timeout_seconds: Seconds = Field(
        default=20, le=600, description="Longest wait for a whole answer, body included."
    )
    max_requests_per_second: float = Field(
        default=0,
        ge=0,
        le=100_000,
        allow_inf_nan=False,
        description="Most expire calls in any second, without bursts; 0 for no limit.",
    )
    transport: Literal["bounded", "requests"] = Field(
        "bounded",
        description="`bounded`: our adapter, a fifth of the CPU; `requests`: its own. A proxy always takes the latter.",
    )
    ca_file: ReadableFile | None = Field(
        default=None,
        description="CA certificates of the gateway.",
        json_schema_extra={"default": "the system's"},
    )

    @field_validator("base_url")
    @classmethod
    def _encrypted(cls, value: str, info: ValidationInfo) -> str:
        parts = urlsplit(value)
        allowed = info.data.get("allow_http", True)  # missing where it is itself invalid: one complaint is enough
        if parts.scheme == "http" and not allowed and not is_loopback(parts.hostname or ""):
            raise ValueError("plain http is only for loopback; use https, or set GATEWAY_ALLOW_HTTP=true")
        return value

    @field_validator("sign_path", mode="before")
    @classmethod
    def _as_called(cls, value: object, info: ValidationInfo) -> object:
        return value if value != "" else info.data.get("expire_path", "/")


class RetrySettings(Group):
    """Repeating one command: rounds in process, and delayed rounds in the broker."""

    model_config = SettingsConfigDict(env_prefix="RETRY_")

    max_attempts: int = Field(default=4, ge=1, le=100, description="Most calls in a round; all of them count.")
    initial_seconds: Seconds = Field(default=0.5, le=60, description="First backoff; it doubles, with full jitter.")
    max_seconds: Seconds = Field(default=8, le=300, description="Longest backoff between two calls.")
    # The broker takes a command back that is unacked for 30 minutes; a round must end long before.
    budget_seconds: Seconds = Field(default=20, le=900, description="Longest time that a round may take.")
    delays_seconds: Delays = Field(
        default=(30, 300, 1800),
        description="Whole seconds before each delayed round, which waits in the broker; `none` for none.",
    )

    @field_validator("max_seconds")
    @classmethod
    def _ceiling(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("initial_seconds", 0):
            raise ValueError("must not be below RETRY_INITIAL_SECONDS")
        return value


class BreakerSettings(Group):
    """When to stop calling a gateway that fails."""

    model_config = SettingsConfigDict(env_prefix="BREAKER_")

    failures: int = Field(
        default=10, ge=1, le=10_000, description="Failures in a row, over all commands, that open it."
    )
    cooldown_seconds: Seconds = Field(default=15, le=3_600, description="Pause before the first probe; it doubles.")
    max_cooldown_seconds: Seconds = Field(default=300, le=86_400, description="Longest pause between two probes.")

    @field_validator("max_cooldown_seconds")
    @classmethod
    def _ceiling(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("cooldown_seconds", 0):
            raise ValueError("must not be below BREAKER_COOLDOWN_SECONDS")
        return value


class WorkerSettings(Group):
    """How much is done at once."""

    model_config = SettingsConfigDict(env_prefix="WORKER_")

    concurrency: int = Field(default=32, ge=1, le=1024, description="Requests in flight per process.")
    sweep_share: float = Field(
        default=0.75,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="The most of them that the sweep lane may hold, rounded down.",
    )
    drain_seconds: Seconds = Field(default=25, le=3_600, description="From SIGTERM to a forced stop.")
    processes: int = Field(default=1, ge=1, le=64, description="Processes under one parent.")


class MetricsSettings(Group):
    """Where metrics and health are served."""

    model_config = SettingsConfigDict(env_prefix="METRICS_")

    host: Host = Field(default="0.0.0.0", description="Address of `/metrics`, `/livez` and `/readyz`.")
    port: int = Field(default=9108, ge=1, le=65_535, description="Their port.")


class LogSettings(Group):
    """What is logged, and how."""

    model_config = SettingsConfigDict(env_prefix="LOG_")

    format: Annotated[LogFormat | None, BeforeValidator(_lower)] = Field(
        default=None,
        description="`json` or `console`.",
        json_schema_extra={"default": "`json`, `console` on a terminal"},
    )
    level: Annotated[LogLevel, BeforeValidator(_lower)] = Field(
        default="info", description="`debug`, `info`, `warning` or `error`."
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """All groups."""

    amqp: AmqpSettings
    gateway: GatewaySettings
    retry: RetrySettings
    breaker: BreakerSettings
    worker: WorkerSettings
    metrics: MetricsSettings
    log: LogSettings

    def advice(self) -> list[str]:
        """What is allowed and seldom meant, a line each: ``VARIABLE: what comes of it, what to do``."""
        attempts, failures = self.retry.max_attempts, self.breaker.failures
        if failures > attempts:
            return []
        advice = (
            f"BREAKER_FAILURES: {failures} is not above RETRY_MAX_ATTEMPTS, {attempts}: one bad bill pauses all; "
            f"set it to {attempts + 1} or more"
        )
        return [advice]


GROUPS: Final[tuple[type[Group], ...]] = (
    AmqpSettings,
    GatewaySettings,
    RetrySettings,
    BreakerSettings,
    WorkerSettings,
    MetricsSettings,
    LogSettings,
)


# --- loading ------------------------------------------------------------------------------------------------

G = TypeVar("G", bound=Group)
H = TypeVar("H", bound=Group)
Variables = Mapping[str, str]


@overload
def load(*, environ: Variables = ..., env_file: Path | None = ...) -> Settings: ...
@overload
def load(group: type[G], /, *, environ: Variables = ..., env_file: Path | None = ...) -> G: ...
@overload
def load(
    group: type[G], other: type[H], /, *, environ: Variables = ..., env_file: Path | None = ...
) -> tuple[G, H]: ...
def load(*groups: type[Group], environ: Variables = os.environ, env_file: Path | None = Path(".env")) -> Any:
    """All `Settings`; with one group named that group, with two both.

    The environment wins over ``env_file``; an empty variable is unset. Only variables of the wanted groups
    are looked at. Raises `SettingsError` with everything that is wrong.
    """
    problems: list[str] = []
    sources = [_set_ones(environ), _set_ones(_env_file(env_file, problems))]
    problems += _unknown(groups or GROUPS, sources)
    made: list[Group] = []
    for group in groups or GROUPS:
        try:
            made.append(_build(group, *_values(group, sources)))
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError(problems)
    if not groups:
        return Settings(*made)  # type: ignore[arg-type]  # in the order of GROUPS
    return made[0] if len(made) == 1 else tuple(made)


def read_secret_file(path: Path) -> SecretStr:
    """What a mounted file holds, without its trailing newline. Raises `ValueError` with a text for people."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
    except FileNotFoundError:
        raise ValueError("no such file; mount it, or correct the path") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); make it readable, or correct the path") from None
    if len(content) > MAX_SECRET_BYTES:
        raise ValueError(f"is larger than {MAX_SECRET_BYTES} bytes; it must hold nothing but the secret")
    if not _is_utf8(content):
        raise ValueError("is not UTF-8 text; write the secret into it as text")
    text = re.sub(r"\r?\n\Z", "", content.decode())
    if not text:
        raise ValueError("is empty; write the secret into it")
    return SecretStr(text)


def reference(groups: Iterable[type[Group]] = GROUPS) -> list[tuple[str, str, str]]:
    """Variable, default and meaning of every setting, in Markdown, as the README shows them."""
    return [
        (group.variable(name), _default(field), field.description or "")
        for group in groups
        for name, field in group.model_fields.items()
    ]


def _set_ones(source: Variables) -> Variables:
    return {name: value for name, value in source.items() if value != ""}


def _env_file(path: Path | None, problems: list[str]) -> Variables:
    """The variables as written: nothing is expanded, since a secret may well hold ``${``."""
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(parse_stream(file))
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror}); make it readable, or remove it")
        return {}
    except UnicodeDecodeError:
        problems.append(f"{path.name}: is not UTF-8 text; save it as UTF-8")
        return {}
    problems += [
        f"{path.name}: line {line.original.line} is not NAME=value; correct or quote it"
        for line in lines
        if line.error or (line.key is not None and line.value is None)
    ]
    return {line.key: line.value or "" for line in lines if line.key is not None}


def _unknown(groups: Iterable[type[Group]], sources: Iterable[Variables]) -> Iterator[str]:
    known = {group.variable(name) for group in groups for name in group.model_fields}
    prefixes = tuple(group.prefix_of_variables() for group in groups)
    for name in sorted({name for source in sources for name in source} - known):
        if name.startswith(prefixes):
            yield f"{name}: unknown setting; {_suggestion(name, known)}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    if re.search(r"_SERVICE_(HOST|PORT)|_PORT_[0-9]+_(TCP|UDP)", name):
        return "Kubernetes adds it for a Service of that name: set enableServiceLinks: false in the pod"
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else "remove it, no setting has a name like it"


def _values(group: type[Group], sources: Iterable[Variables]) -> tuple[dict[str, Any], dict[str, str]]:
    """Field → value, and field → what is wrong with how it was given."""
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    files = group.file_forms()
    for name in (name for name in group.model_fields if name not in files.values()):
        variable, forms = group.variable(name), [name, *filter(None, [files.get(name)])]
        # The highest source that has either form settles it: a lower one's other form must not come back.
        given = next(filter(None, (_given(group, forms, source) for source in sources)), {})
        if len(given) == 2:
            wrong[name] = f"{variable}: {group.variable(files[name])} is set as well; keep one of the two"
        elif not all(_is_encodable(value) for value in given.values()):
            wrong[name] = f"{variable}: is not UTF-8 text; correct its encoding"
        elif name in given:
            values[name] = given[name]
        elif given:
            _read_mounted(group, name, Path(given[files[name]]), values, wrong)
    return values, wrong


def _given(group: type[Group], names: Iterable[str], source: Variables) -> dict[str, str]:
    return {name: source[group.variable(name)] for name in names if group.variable(name) in source}


def _read_mounted(group: type[Group], name: str, path: Path, values: dict[str, Any], wrong: dict[str, str]) -> None:
    file_field = group.file_forms()[name]
    try:
        values |= {name: read_secret_file(path), file_field: path}
    except ValueError as error:
        wrong[name] = f"{group.variable(file_field)}: {error}"


def _build(group: type[G], values: Mapping[str, Any], wrong: Mapping[str, str]) -> G:
    """The group; or all that was wrong before and every broken rule, in one `SettingsError`."""
    found: list[ErrorDetails] = []
    try:
        made = group(**values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    # Raised outside the handler, or the traceback would carry pydantic's error and with it the values.
    problems = [
        *wrong.values(),
        *(_problem(group, values, each) for each in found if each["loc"][0] not in wrong),
    ]
    if problems:
        raise SettingsError(problems)
    return made


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_encodable(value: str) -> bool:
    """False for bytes of the environment that are no UTF-8: Python carries them as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- words --------------------------------------------------------------------------------------------------


def _problem(group: type[Group], values: Mapping[str, Any], detail: ErrorDetails) -> str:
    name = str(detail["loc"][0])
    field, file_form = group.model_fields[name], group.file_forms().get(name)
    if detail["type"] == "missing":
        either = f" (or {group.variable(file_form)})" if file_form else ""
        return f"{group.variable(name)}: is not set; set it{either}. {_plain(field.description or '')}"
    shown = file_form if file_form in values else name
    if detail["type"] == "value_error":
        return f"{group.variable(str(shown))}: {detail['ctx']['error']}"
    return f"{group.variable(str(shown))}: must be {_expected(field)}"


def _expected(field: FieldInfo) -> str:
    """The rule of a field in words, from its type and bounds."""
    kind = next((kind for kind in _alternatives(field.annotation) if kind is not types.NoneType), str)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return f"a {'whole ' if kind is int else ''}number {_bounds(field)}".rstrip()
    longest = next((rule.max_length for rule in field.metadata if isinstance(rule, MaxLen)), None)
    return f"text of at most {longest} characters" if longest else "text"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _bounds(field: FieldInfo) -> str:
    words = {Gt: "above {0.gt}", Ge: "of at least {0.ge}", Le: "and at most {0.le}"}
    rules = {type(rule): rule for rule in field.metadata}
    return " ".join(text.format(rules[kind]) for kind, text in words.items() if kind in rules)


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


def _plain(text: str) -> str:
    return text.replace("`", "").rstrip(".")
