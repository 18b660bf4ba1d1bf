"""Every setting, declared once: name, rule, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

from worker.core.scheme import WITH_SECRET, Scheme, oddity_of
from worker.core.topology import Names, QueueType
from worker.core.urls import is_loopback, is_tls, split_amqp_urls
from worker.settings import rules
from worker.settings.group import Secret, SettingsGroup, mounted, setting

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]


class AmqpSettings(SettingsGroup, variables="AMQP_"):
    """The broker."""

    url: Secret = setting(
        rules.amqp_urls,
        "One URL, or several separated by commas for the nodes of a cluster; `amqps://` for TLS.",
        default=Secret("amqp://guest:guest@localhost:5672/%2F"),
    )
    url_file: Path | None = mounted("AMQP_URL", default=None)
    prefix: str = setting(rules.amqp_prefix, "Prefix of every exchange and queue.", default="qris.expire")
    queue_type: QueueType = setting(rules.one_of(*get_args(QueueType)), "`quorum`, or `classic`.", default="quorum")
    declare: bool = setting(
        rules.flag,
        "`false`: somebody else declares the topology; the worker only verifies it and says what is missing.",
        default=True,
    )
    ca_file: Path | None = setting(
        rules.readable_file, "CA certificates of the broker.", default=None, shown="the system's"
    )
    cert_file: Path | None = setting(rules.readable_file, "Client certificate for mutual TLS.", default=None)
    key_file: Path | None = setting(rules.readable_file, "Private key of that certificate.", default=None)

    management_url: Secret | None = setting(
        rules.management_url,
        "The broker's management API, as `https://user:password@host:15671`, for a look at its policies.",
        default=None,
        shown="the usual port of `AMQP_URL`'s hosts",
    )
    management_url_file: Path | None = mounted("AMQP_MANAGEMENT_URL", default=None)

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """A certificate without its key, and the other way round; TLS files where no TLS is spoken."""
        if "url" in values and not is_tls(values["url"].get_secret_value()):
            for name in ("ca_file", "cert_file", "key_file"):
                if values.get(name) is not None:
                    yield name, "is for TLS, and AMQP_URL begins with amqp://; begin it with amqps://, or unset this"
            return
        if {"cert_file", "key_file"} <= values.keys() and (values["cert_file"] is None) != (values["key_file"] is None):
            yield "key_file", "goes together with AMQP_CERT_FILE; set both or neither"

    @property
    def names(self) -> Names:
        """The names of exchanges and queues."""
        return Names(self.prefix)

    def urls(self) -> list[str]:
        """The URLs in clear, passwords included: for the client library alone."""
        return split_amqp_urls(self.url.get_secret_value())


def _merchant() -> Any:
    return setting(rules.identifier, "Merchant of the commands that carry none.", default=None)


class DefaultMerchant(SettingsGroup, variables="GATEWAY_MERCHANT_"):
    """The one setting of the gateway that a sweep through the broker looks at."""

    id: str | None = _merchant()


class GatewaySettings(SettingsGroup, variables="GATEWAY_"):
    """The payment gateway."""

    allow_http: bool = setting(rules.flag, "`true` allows plain http to other hosts than this one.", default=False)
    base_url: str = setting(
        rules.base_url, "The gateway with its version, as `https://host/v1.0`; plain http only for loopback."
    )
    token_path: str = setting(
        rules.url_path, "Path of the token service, after the base URL.", default="/access-token/b2b"
    )
    expire_path: str = setting(
        rules.url_path, "Path of the expire service, after the base URL.", default="/qr/qr-mpm-expire-billnumber"
    )
    sign_path: str = setting(
        rules.url_path,
        "Path that is signed, where it is not the one that is called.",
        default="",
        shown="the same as `GATEWAY_EXPIRE_PATH`",
    )
    client_id: str = setting(rules.header_value, "The id given at onboarding.")
    client_secret: Secret | None = setting(
        Secret, "The secret given at onboarding.", default=None, shown="required for `hmac-sha512`"
    )
    client_secret_file: Path | None = mounted("GATEWAY_CLIENT_SECRET", default=None)
    private_key: Secret | None = setting(
        Secret, "The RSA private key itself.", default=None, shown="required, or its file"
    )
    private_key_file: Path | None = setting(
        rules.readable_file,
        "File of the RSA private key, PKCS#8 or PKCS#1.",
        default=None,
        shown="required, or the key itself",
    )
    private_key_passphrase: Secret | None = setting(Secret, "Passphrase of that key, if it has one.", default=None)
    private_key_passphrase_file: Path | None = mounted("GATEWAY_PRIVATE_KEY_PASSPHRASE", default=None)
    channel_id: str = setting(rules.header_value, "The merchant's channel id.")
    channel_headers: tuple[str, ...] = setting(
        rules.header_names,
        "Headers that carry the channel id, separated by commas.",
        default=("CHANNEL-ID", "X-CHANNEL-ID"),
    )
    merchant_id: str | None = _merchant()
    signature: Scheme = setting(
        rules.one_of(*get_args(Scheme)),
        "How an expire is signed: `hmac-sha512`, `rsa-sha256` or `rsa-sha256-no-token`.",
        default="hmac-sha512",
    )
    bill_field: str = setting(
        rules.member, "Name of the bill in the gateway's body, or `billNumber`.", default="billnumber"
    )
    timestamp_milliseconds: bool = setting(
        rules.flag, "`false` leaves the milliseconds out of `X-TIMESTAMP`.", default=True
    )
    connect_timeout_seconds: float = setting(rules.seconds(most=300), "Longest wait for a connection.", default=5)
    read_timeout_seconds: float = setting(
        rules.seconds(most=600), "Longest wait for a whole answer, body included.", default=20
    )
    max_requests_per_second: float = setting(
        rules.number(least=0, most=100_000),
        "Most expire calls in any second over the whole fleet, without bursts; 0 for no limit.",
        default=0,
    )
    ca_file: Path | None = setting(
        rules.readable_file, "CA certificates of the gateway.", default=None, shown="the system's"
    )
    cert_file: Path | None = setting(
        rules.readable_file, "Client certificate, for a gateway that asks for one.", default=None
    )
    key_file: Path | None = setting(rules.readable_file, "Private key of that certificate.", default=None)

    @classmethod
    def file_forms(cls) -> dict[str, str]:
        """See `SettingsGroup`. The file of the private key is not text: `core.signing` reads it by its content."""
        return {name: file for name, file in super().file_forms().items() if name != "private_key"}

    def __post_init__(self) -> None:
        """The path that is signed is the one that is called, unless it is set."""
        if not self.sign_path:
            object.__setattr__(self, "sign_path", self.expire_path)

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Plain http to another host that is not allowed; secrets that are missing, or given twice."""
        url = urlsplit(values.get("base_url", ""))
        if url.scheme == "http" and not values.get("allow_http", True) and not is_loopback(url.hostname or ""):
            yield "base_url", "plain http is only for loopback; use https, or set GATEWAY_ALLOW_HTTP=true"
        if values.get("signature", WITH_SECRET) == WITH_SECRET and values.get("client_secret", "wrong itself") is None:
            yield "client_secret", "is not set; set it (or GATEWAY_CLIENT_SECRET_FILE). The secret given at onboarding"
        if {"private_key", "private_key_file"} <= values.keys():
            given = [name for name in ("private_key", "private_key_file") if values[name] is not None]
            if not given:
                yield (
                    "private_key_file",
                    "is not set; set it (or GATEWAY_PRIVATE_KEY). File of the RSA private key, PKCS#8 or PKCS#1",
                )
            if len(given) > 1:
                yield "private_key", "is set beside GATEWAY_PRIVATE_KEY_FILE; give one of them"
        if {"cert_file", "key_file"} <= values.keys() and (values["cert_file"] is None) != (values["key_file"] is None):
            yield "key_file", "goes together with GATEWAY_CERT_FILE; set both or neither"
        if url.scheme == "http" and values.get("cert_file") is not None:
            yield "cert_file", "is only used with https; correct GATEWAY_BASE_URL, or unset it"


class RetrySettings(SettingsGroup, variables="RETRY_"):
    """How one command is retried: attempts in process, and delayed rounds in the broker."""

    max_attempts: int = setting(rules.whole(least=1, most=100), "Most calls in a round; all of them count.", default=4)
    initial_seconds: float = setting(
        rules.seconds(most=60), "First backoff; it doubles, with full jitter.", default=0.5
    )
    max_seconds: float = setting(rules.seconds(most=300), "Longest backoff between two calls.", default=8)
    # The broker takes a command back that is unacked for 30 minutes; a round must end long before.
    budget_seconds: float = setting(rules.seconds(most=900), "Longest time that a round may take.", default=20)
    delays_seconds: tuple[int, ...] = setting(
        rules.delays,
        "Whole seconds before each delayed round, which waits in the broker; entries may repeat; `none` for none.",
        default=(30, 300, 1800),
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """A longest backoff below the first one."""
        if _below(values, "max_seconds", "initial_seconds"):
            yield "max_seconds", "must not be below RETRY_INITIAL_SECONDS"


class BreakerSettings(SettingsGroup, variables="BREAKER_"):
    """When to stop calling a gateway that fails."""

    failures: int = setting(
        rules.whole(least=1, most=10_000), "Failed attempts of a lane in a row that open its breaker.", default=10
    )
    cooldown_seconds: float = setting(
        rules.seconds(most=3_600), "Pause before the first probe; it doubles.", default=15
    )
    max_cooldown_seconds: float = setting(rules.seconds(most=86_400), "Longest pause between two probes.", default=60)

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """A longest cooldown below the first one."""
        if _below(values, "max_cooldown_seconds", "cooldown_seconds"):
            yield "max_cooldown_seconds", "must not be below BREAKER_COOLDOWN_SECONDS"


class WorkerSettings(SettingsGroup, variables="WORKER_"):
    """How much is done at once."""

    concurrency: int = setting(rules.whole(least=1, most=1024), "Requests in flight per process.", default=32)
    sweep_share: float = setting(
        rules.number(above=0, most=1), "The most of them that the sweep lane may hold, rounded down.", default=0.75
    )
    drain_seconds: float = setting(rules.seconds(most=3_600), "From SIGTERM to a forced stop.", default=25)
    processes: int = setting(rules.whole(least=1, most=64), "Processes under one parent.", default=1)


class MetricsSettings(SettingsGroup, variables="METRICS_"):
    """Where metrics and health are served."""

    host: str = setting(
        rules.host, "Address of the status page `/`, `/metrics`, `/livez` and `/readyz`.", default="0.0.0.0"
    )
    port: int = setting(rules.whole(least=1, most=65_535), "Their port.", default=9108)


class LogSettings(SettingsGroup, variables="LOG_"):
    """What is logged, and how."""

    format: LogFormat | None = setting(
        rules.one_of(*get_args(LogFormat)),
        "`json` or `console`.",
        default=None,
        shown="`json`, `console` on a terminal",
    )
    level: LogLevel = setting(
        rules.one_of(*get_args(LogLevel)), "`debug`, `info`, `warning` or `error`.", default="info"
    )


def _below(values: Mapping[str, Any], longest: str, first: str) -> bool:
    return {longest, first} <= values.keys() and bool(values[longest] < values[first])


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
        """What is allowed and seldom meant, a line each: ``VARIABLE: what follows from it, what to do``."""
        return [*self._in_clear(), *self._breaker_advice(), *self._odd_secrets()]

    def _in_clear(self) -> Iterator[str]:
        hosts = {urlsplit(url).hostname or "" for url in self.amqp.urls() if not is_tls(url)}
        for host in sorted(host for host in hosts if not is_loopback(host)):
            yield f"AMQP_URL: password and commands go to {host} in clear; use amqps://"
        if self.amqp.management_url is not None:
            api = urlsplit(self.amqp.management_url.get_secret_value())
            if api.scheme == "http" and not is_loopback(api.hostname or ""):
                yield f"AMQP_MANAGEMENT_URL: the password goes to {api.hostname} in clear; use https://"
        base = urlsplit(self.gateway.base_url)
        if base.scheme == "http" and not is_loopback(base.hostname or ""):
            yield f"GATEWAY_ALLOW_HTTP: token and bills go to {base.hostname} in clear; use https://"

    def _breaker_advice(self) -> Iterator[str]:
        attempts, failures = self.retry.max_attempts, self.breaker.failures
        if failures <= attempts:
            yield (
                f"BREAKER_FAILURES: {failures} is not above RETRY_MAX_ATTEMPTS, {attempts}: one bad bill pauses its "
                f"lane; set it to {attempts + 1} or more"
            )

    def _odd_secrets(self) -> Iterator[str]:
        """What was pasted with something around it, told without its value."""
        for name in ("client_id", "client_secret", "private_key_passphrase", "channel_id", "merchant_id"):
            value: Secret | str | None = getattr(self.gateway, name)
            text = value.get_secret_value() if isinstance(value, Secret) else value or ""
            if oddity := oddity_of(text):
                yield f"{self.gateway.variable(name)}: {oddity}"


GROUPS: Final[tuple[type[SettingsGroup], ...]] = tuple(get_type_hints(Settings).values())
"""Those of `Settings`, in its order."""


def reference() -> list[tuple[str, str, str]]:
    """Variable, default and meaning of every setting, in Markdown, as the README shows them."""
    return [
        (group.variable(name), declared.documented(), declared.meaning)
        for group in GROUPS
        for name, declared in group.declared().items()
    ]
