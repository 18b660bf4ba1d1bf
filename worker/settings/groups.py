"""Every setting, declared once: name, rule, default and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from worker.core.topology import Names
from worker.core.urls import is_loopback, split_amqp_urls
from worker.settings.group import Group
from worker.settings.rules import (
    AmqpPrefix,
    AmqpUrls,
    BaseUrl,
    Delays,
    HeaderNames,
    HeaderValue,
    Host,
    LogFormat,
    LogLevel,
    Member,
    Merchant,
    QueueType,
    ReadableFile,
    Seconds,
    Signature,
    UrlPath,
    lower,
)


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
        description="`bounded`: our adapter; `requests`: its own, four times the CPU. A proxy always takes the latter.",
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

    host: Host = Field(
        default="0.0.0.0", description="Address of the status page `/`, `/metrics`, `/livez` and `/readyz`."
    )
    port: int = Field(default=9108, ge=1, le=65_535, description="Their port.")


class LogSettings(Group):
    """What is logged, and how."""

    model_config = SettingsConfigDict(env_prefix="LOG_")

    format: Annotated[LogFormat | None, BeforeValidator(lower)] = Field(
        default=None,
        description="`json` or `console`.",
        json_schema_extra={"default": "`json`, `console` on a terminal"},
    )
    level: Annotated[LogLevel, BeforeValidator(lower)] = Field(
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
