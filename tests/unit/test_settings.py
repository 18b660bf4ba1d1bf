"""Settings: what is taken from where, what is refused in which words, and that no secret is ever repeated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.settings import (
    GROUPS,
    AmqpSettings,
    GatewaySettings,
    LogSettings,
    MetricsSettings,
    RetrySettings,
    Settings,
    SettingsError,
    WorkerSettings,
    load,
    read_secret_file,
    reference,
)

MARK = "s3cr3t"
TOO_MANY = ",".join(map(str, range(1, 30)))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    path.write_text("a key")
    return path


@pytest.fixture
def required(key_file: Path) -> dict[str, str]:
    return {
        "GATEWAY_BASE_URL": "https://gateway.example/v1.0",
        "GATEWAY_CLIENT_ID": "client",
        "GATEWAY_CLIENT_SECRET": MARK,
        "GATEWAY_PRIVATE_KEY_FILE": str(key_file),
        "GATEWAY_CHANNEL_ID": "95051",
    }


def problems(*groups: Any, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(*groups, environ=environ, env_file=None)
    return caught.value.problems


def problem(group: Any, **environ: str) -> str:
    (only,) = problems(group, **environ)
    return only


def amqp(tmp_env: Path | None = None, **environ: str) -> AmqpSettings:
    return load(AmqpSettings, environ=environ, env_file=tmp_env)


def test_defaults_are_the_contract_s(required: dict[str, str]) -> None:
    """With only the required settings, every other one has the documented default."""

    settings = load(environ=required, env_file=None)

    assert isinstance(settings, Settings)
    assert settings.amqp.urls() == ["amqp://guest:guest@localhost:5672/%2F"]
    assert (settings.amqp.prefix, settings.amqp.queue_type, settings.amqp.declare) == (
        "qris.expire",
        "quorum",
        True,
    )
    assert settings.gateway.token_path == "/access-token/b2b"
    assert settings.gateway.sign_path == settings.gateway.expire_path == "/qr/qr-mpm-expire-billnumber"
    assert settings.gateway.channel_headers == ("CHANNEL-ID", "X-CHANNEL-ID")
    assert (settings.gateway.connect_timeout_seconds, settings.gateway.read_timeout_seconds) == (5, 20)
    assert (settings.retry.max_attempts, settings.retry.delays_seconds) == (4, (30, 300, 1800))
    assert (settings.worker.concurrency, settings.worker.sweep_share) == (32, 0.75)
    assert (settings.metrics.host, settings.metrics.port) == ("0.0.0.0", 9108)
    assert (settings.log.format, settings.log.level) == (None, "info")


def test_all_problems_at_once() -> None:
    """Everything that is wrong is reported together, each by its variable, with what to do."""

    found = problems(WORKER_CONCURRENCY="0", METRICS_PORT="x", LOG_LEVEL="loud", RETRY_MAX_ATTEMPTS="none")

    assert found == [
        (
            "GATEWAY_BASE_URL: is not set; set it. The gateway with its version, as https://host/v1.0; "
            "plain http only for loopback"
        ),
        "GATEWAY_CLIENT_ID: is not set; set it. The id given at onboarding",
        ("GATEWAY_CLIENT_SECRET: is not set; set it (or GATEWAY_CLIENT_SECRET_FILE). The secret given at onboarding"),
        (
            "GATEWAY_PRIVATE_KEY_FILE: is not set; set it (or GATEWAY_PRIVATE_KEY). "
            "File of the RSA private key, PKCS#8 or PKCS#1"
        ),
        "GATEWAY_CHANNEL_ID: is not set; set it. The merchant's channel id",
        "RETRY_MAX_ATTEMPTS: must be a whole number of at least 1 and at most 100",
        "WORKER_CONCURRENCY: must be a whole number of at least 1 and at most 1024",
        "METRICS_PORT: must be a whole number of at least 1 and at most 65535",
        "LOG_LEVEL: must be one of debug, info, warning, error",
    ]


# --- sources


def test_environment_wins_over_env_file(tmp_path: Path) -> None:
    """The environment wins over `.env`, which wins over the default; an empty variable is an unset one."""

    env_file = tmp_path / ".env"
    env_file.write_text("AMQP_PREFIX=from.file\nAMQP_QUEUE_TYPE=classic\nAMQP_DECLARE=\n")

    settings = amqp(env_file, AMQP_PREFIX="from.environment", AMQP_QUEUE_TYPE="")

    assert settings.prefix == "from.environment"
    assert settings.queue_type == "classic"
    assert settings.declare is True


def test_env_file_expands_nothing(tmp_path: Path) -> None:
    """A `${` in a secret of `.env` is taken as written."""

    env_file = tmp_path / ".env"
    env_file.write_text("AMQP_URL='amqp://u:a${HOME}b@host/'\n")

    assert amqp(env_file).urls() == ["amqp://u:a${HOME}b@host/"]


def test_bad_env_file_line_is_named(tmp_path: Path) -> None:
    """A line of `.env` that sets nothing is a problem, named by its number and not by its text."""

    env_file = tmp_path / ".env"
    env_file.write_text(f"AMQP_PREFIX=a\nAMQP_URL='{MARK}\nAMQP_DECLARE\n")

    with pytest.raises(SettingsError) as caught:
        amqp(env_file)

    assert caught.value.problems == [
        ".env: line 2 is not NAME=value; correct or quote it",
        ".env: line 3 is not NAME=value; correct or quote it",
    ]


def test_directory_as_env_file_is_a_problem(tmp_path: Path) -> None:
    """A `.env` that cannot be read is a problem; a missing one is none."""

    with pytest.raises(SettingsError, match="cannot be read"):
        amqp(tmp_path)
    assert amqp(tmp_path / "missing").prefix == "qris.expire"


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666, 0o777])
def test_env_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Who can write `.env` decides where our secrets are sent; nothing of it is taken."""

    env_file = tmp_path / ".env"
    env_file.write_text("AMQP_PREFIX=theirs\n")
    env_file.chmod(mode)

    with pytest.raises(SettingsError) as caught:
        amqp(env_file)

    assert caught.value.problems == [f".env: can be written by others (mode {mode:o}); run `chmod go-w .env`"]


@pytest.mark.parametrize("through_a_link", [False, True])
def test_env_file_of_another_user_is_refused(tmp_path: Path, through_a_link: bool) -> None:
    """A `.env` in a directory that we share may be a trap, also behind a link."""

    theirs, env_file = tmp_path / "theirs", tmp_path / ".env"
    theirs.write_text("AMQP_PREFIX=theirs\n")
    if through_a_link:
        env_file.symlink_to(theirs)
    else:
        theirs.rename(env_file)
    os.chown(env_file, os.geteuid() + 4321, -1)

    with pytest.raises(SettingsError, match=r"^\.env: belongs to another user"):
        amqp(env_file)


def test_unknown_setting_names_the_nearest() -> None:
    """An unknown name with one of our prefixes is an error that suggests the nearest valid one."""

    assert problem(AmqpSettings, AMQP_PREFX="x") == "AMQP_PREFX: unknown setting; did you mean AMQP_PREFIX?"
    assert "no setting has a name like it" in problem(AmqpSettings, AMQP_ZZZZ="x")
    assert "enableServiceLinks" not in problem(AmqpSettings, AMQP_PORT="5672")


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (MetricsSettings, "METRICS_PORT", "tcp://10.0.0.1:9108"),
        (MetricsSettings, "METRICS_PORT_9108_TCP_ADDR", "10.0.0.1"),
        (MetricsSettings, "METRICS_SERVICE_PORT_HTTP", "9108"),
        (AmqpSettings, "AMQP_PORT", "tcp://10.0.0.1:5672"),
        (LogSettings, "LOG_PORT", "udp://10.0.0.1:514"),
        (WorkerSettings, "WORKER_PORT", "sctp://[fd00::1]:9"),
    ],
)
def test_what_kubernetes_sets_for_a_service_is_told(group: Any, name: str, value: str) -> None:
    """A Service whose name is the beginning of our variables sets some; the problem says so, and the cure."""

    found = problem(group, **{name: value})

    assert found.startswith(f"{name}: ")
    assert "enableServiceLinks: false" in found


def test_only_the_wanted_groups_are_checked() -> None:
    """A command that needs only the broker's settings does not stumble over others."""

    settings = amqp(GATEWAY_BASE_URL="nonsense", LOG_COLOUR="red", AMQPX="1", AMQP_UNSET="")

    assert settings.prefix == "qris.expire"


def test_two_groups_come_together() -> None:
    """Two groups named are both returned, in that order."""

    broker, retry = load(AmqpSettings, RetrySettings, environ={"RETRY_DELAYS_SECONDS": "1,2"}, env_file=None)

    assert (broker.prefix, retry.delays_seconds) == ("qris.expire", (1, 2))


# --- mounted secrets


def test_secret_from_a_mounted_file(required: dict[str, str], tmp_path: Path) -> None:
    """`<NAME>_FILE` is read without its trailing newline, and the path is kept."""

    mounted = tmp_path / "secret"
    mounted.write_text(" with blanks \n")
    del required["GATEWAY_CLIENT_SECRET"]

    gateway = load(GatewaySettings, environ=required | {"GATEWAY_CLIENT_SECRET_FILE": str(mounted)}, env_file=None)

    assert gateway.client_secret is not None
    assert gateway.client_secret.get_secret_value() == " with blanks "
    assert gateway.client_secret_file == mounted


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "is empty"), (b"\n", "is empty"), (b"\xff", "is not UTF-8"), (b"x" * 70_000, "is larger than")],
)
def test_mounted_file_must_hold_a_secret(tmp_path: Path, content: bytes, complaint: str) -> None:
    """An empty, binary or huge file is no secret."""

    mounted = tmp_path / "secret"
    mounted.write_bytes(content)

    assert problem(AmqpSettings, AMQP_URL_FILE=str(mounted)).startswith(f"AMQP_URL_FILE: {complaint}")
    with pytest.raises(ValueError, match=complaint):
        read_secret_file(mounted)


def test_missing_mounted_file_is_one_problem(required: dict[str, str]) -> None:
    """A missing file is reported once, by the variable that names it."""

    del required["GATEWAY_CLIENT_SECRET"]

    found = problem(GatewaySettings, **required, GATEWAY_CLIENT_SECRET_FILE="/nowhere/secret")

    assert found == "GATEWAY_CLIENT_SECRET_FILE: no such file; mount it, or correct the path"


def test_both_forms_in_one_source_exclude_each_other() -> None:
    """A setting and its `_FILE` in the same source are an error."""

    found = problem(AmqpSettings, AMQP_URL="amqp://host", AMQP_URL_FILE="/x")

    assert found == "AMQP_URL: AMQP_URL_FILE is set as well; keep one of the two"


def test_higher_source_beats_the_other_form(tmp_path: Path) -> None:
    """One form in the environment beats the other form in `.env`."""

    mounted, env_file = tmp_path / "url", tmp_path / ".env"
    mounted.write_text("amqp://mounted")

    env_file.write_text("AMQP_URL=amqp://file")
    assert amqp(env_file, AMQP_URL_FILE=str(mounted)).urls() == ["amqp://mounted"]

    env_file.write_text("AMQP_URL_FILE=/nowhere")
    assert amqp(env_file, AMQP_URL="amqp://environment").urls() == ["amqp://environment"]


def test_reread_sees_a_rotated_secret(tmp_path: Path) -> None:
    """`reread` takes the mounted file as it is now, and refuses what the rules refuse."""

    mounted = tmp_path / "url"
    mounted.write_text("amqp://old")
    settings = amqp(AMQP_URL_FILE=str(mounted), AMQP_PREFIX="mine")

    mounted.write_text("amqp://new\n")
    assert settings.reread().urls() == ["amqp://new"]
    assert settings.reread().prefix == "mine"

    mounted.write_text("http://new")
    with pytest.raises(SettingsError, match=r"^AMQP_URL_FILE: must begin with amqp"):
        settings.reread()


# --- rules


@pytest.mark.parametrize(
    "url",
    [
        "amqp://localhost",
        "AMQPS://user:p%40ss@broker.example:5671/%2Fvhost",
        "amqp://[::1]:5672/",
        "amqp://a,amqp://b:1/v , AMQP://c/%2F?heartbeat=5&connection_attempts=2",
        "amqp://user:with,comma@host",
    ],
)
def test_amqp_urls_that_are_fine(url: str) -> None:
    """One URL or several; a comma in a password does not separate."""

    settings = amqp(AMQP_URL=url)

    assert all(each.lower().startswith("amqp") for each in settings.urls())


@pytest.mark.parametrize(
    "url",
    [
        "localhost",
        "http://host",
        "amqp://",
        "amqp://host:0",
        "amqp://host:99999",
        f"amqp://{MARK}@host",
        f"amqp://u:{MARK}/x@host",
        f"amqp://u:12/{MARK}@host",
        f"amqp://u:{MARK}@x@host",
        f"amqp://u:{MARK}?x@host",
        f"amqp://u:12#{MARK}@host",
        f"amqp://u:{MARK}@host/a/b",
        f"amqp://u:{MARK}@a,u:{MARK}@b",
        f"amqp://u:{MARK}@host?heartbeat={MARK}",
        f"amqp://u:{MARK}@host?{MARK}=1",
        f"amqp://u:{MARK}@host?heartbeat=1&heartbeat=2",
        f"amqp://u:{MARK}@host,",
        f"amqp://u:{MARK} x@host",
        f"amqps://u:{MARK}@a,amqp://u:{MARK}@b",
        f"amqp://u:{MARK}@a , AMQPS://u:{MARK}@b",
        f"amqps://u:{MARK}@host?ssl_options={{'cert_reqs': 0}}",
        f"amqps://u:{MARK}@host?ssl_options={{}}",
        f"amqps://u:{MARK}@host?verify=verify_none",
    ],
)
def test_amqp_urls_that_are_refused(url: str) -> None:
    """A URL that cannot be meant is refused without repeating any of it."""

    found = problem(AmqpSettings, AMQP_URL=url)

    assert found.startswith("AMQP_URL: ")
    assert MARK not in found


@pytest.mark.parametrize(
    "url",
    [
        f"https://{MARK}:{MARK}@",
        f"amqp://u:{MARK}@host",
        "https://host:15671",
        f"https://{MARK}@host",
        f"https://u:{MARK}@x@host",
        f"https://u:{MARK}@host/api",
        f"https://u:{MARK}@host?x",
        f"https://u:{MARK} @host",
    ],
)
def test_management_urls_that_are_refused(url: str) -> None:
    """Scheme, login and host are all that it can have; nothing of it is repeated."""

    found = problem(AmqpSettings, AMQP_MANAGEMENT_URL=url)

    assert found.startswith("AMQP_MANAGEMENT_URL: ")
    assert MARK not in found


@pytest.mark.parametrize("url", [None, "amqp://host", "AMQP://a,amqp://b"])
@pytest.mark.parametrize("name", ["AMQP_CA_FILE", "AMQP_CERT_FILE", "AMQP_KEY_FILE"])
def test_tls_files_without_tls(key_file: Path, url: str | None, name: str) -> None:
    """A file for TLS beside a URL without it is refused: whoever gives one means to be protected."""

    environ = {} if url is None else {"AMQP_URL": url}
    found = problem(AmqpSettings, **environ, **{name: str(key_file)})

    assert found.startswith(f"{name}: is for TLS, and AMQP_URL begins with amqp://")


@pytest.mark.parametrize(
    ("changed", "advised"),
    [
        ({"AMQP_URL": "amqp://u:p@broker.example,amqp://localhost"}, ["AMQP_URL: password and commands go to broker"]),
        ({"AMQP_URL": "amqp://127.0.0.1"}, []),
        ({"AMQP_URL": "amqps://broker.example"}, []),
        (
            {"AMQP_URL": "amqps://broker.example", "AMQP_MANAGEMENT_URL": "http://u:p@broker.example:15672"},
            ["AMQP_MANAGEMENT_URL: the password goes to broker.example in clear; use https://"],
        ),
        ({"AMQP_MANAGEMENT_URL": "http://u:p@localhost:15672"}, []),
        ({"AMQP_MANAGEMENT_URL": "https://u:p@broker.example:15671"}, []),
        (
            {"GATEWAY_BASE_URL": "http://gateway.example/v1.0", "GATEWAY_ALLOW_HTTP": "true"},
            ["GATEWAY_ALLOW_HTTP: token and bills go to gateway.example"],
        ),
        ({"GATEWAY_BASE_URL": "http://[::1]/v1.0", "GATEWAY_ALLOW_HTTP": "true"}, []),
    ],
)
def test_advice_on_what_goes_in_clear(required: dict[str, str], changed: dict[str, str], advised: list[str]) -> None:
    """Plain AMQP or HTTP to another host is taken, and warned about."""

    advice = load(environ={**required, **changed}, env_file=None).advice()

    assert [line[: len(words)] for line, words in zip(advice, advised, strict=True)] == advised


def test_the_wrong_url_of_several_is_counted() -> None:
    """Of several URLs the wrong one is reported by its number."""

    found = problem(AmqpSettings, AMQP_URL="amqp://a,amqp://b:0")

    assert found.startswith("AMQP_URL: URL 2 of 2 has no valid port")


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://host/v1.0/", "https://host/v1.0"),
        ("https://host", "https://host"),
        ("http://127.0.0.1:8093/v1.0", "http://127.0.0.1:8093/v1.0"),
        ("http://localhost/v1.0", "http://localhost/v1.0"),
        ("http://[::1]:1/v1.0", "http://[::1]:1/v1.0"),
    ],
)
def test_base_url_is_kept_without_trailing_slash(required: dict[str, str], url: str, kept: str) -> None:
    """A trailing slash is tolerated; plain http is fine on loopback."""

    gateway = load(GatewaySettings, environ=required | {"GATEWAY_BASE_URL": url}, env_file=None)

    assert gateway.base_url == kept


@pytest.mark.parametrize(
    "url",
    [
        "host/v1.0",
        "ftp://host",
        "https://",
        f"https://u:{MARK}@host",
        "https://host/?a",
        "https://host/#a",
        "https://host?",
        "http://host/v1.0",
        "http://127.0.0.1.evil.example/v1.0",
        "https://host:port/",
        "https://ho st/",
        "https://host/a b",
        "https://host/ü",
    ],
)
def test_base_url_that_is_refused(required: dict[str, str], url: str) -> None:
    """No credentials, query, fragment or plain http beyond loopback."""

    found = problem(GatewaySettings, **(required | {"GATEWAY_BASE_URL": url}))

    assert found.startswith("GATEWAY_BASE_URL: ")
    assert MARK not in found


def test_plain_http_can_be_allowed(required: dict[str, str]) -> None:
    """`GATEWAY_ALLOW_HTTP=true` allows plain http to any host."""

    changed = {"GATEWAY_BASE_URL": "http://host/v1.0", "GATEWAY_ALLOW_HTTP": "true"}

    assert load(GatewaySettings, environ=required | changed, env_file=None).base_url == "http://host/v1.0"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_EXPIRE_PATH", "qr/x"),
        ("GATEWAY_SIGN_PATH", "/qr?x"),
        ("GATEWAY_CLIENT_ID", "a\r\nX-Evil: 1"),
        ("GATEWAY_CLIENT_ID", " a"),
        ("GATEWAY_CHANNEL_ID", "ü"),
        ("GATEWAY_CHANNEL_HEADERS", "CHANNEL-ID,,X"),
        ("GATEWAY_CHANNEL_HEADERS", "CHANNEL ID"),
        ("GATEWAY_CHANNEL_HEADERS", "A,a"),
        ("GATEWAY_CHANNEL_HEADERS", "X-SIGNATURE"),
        ("GATEWAY_MERCHANT_ID", "a b"),
        ("GATEWAY_SIGNATURE", "md5"),
        ("GATEWAY_BILL_FIELD", 'bill"number'),
        ("GATEWAY_BILL_FIELD", "additionalInfo"),
        ("GATEWAY_TIMESTAMP_MILLISECONDS", "maybe"),
        ("GATEWAY_READ_TIMEOUT_SECONDS", "inf"),
        ("GATEWAY_CONNECT_TIMEOUT_SECONDS", "0"),
        ("GATEWAY_MAX_REQUESTS_PER_SECOND", "-1"),
        ("GATEWAY_PRIVATE_KEY_FILE", "/nowhere/key.pem"),
        ("GATEWAY_PRIVATE_KEY_FILE", "/"),
        ("GATEWAY_CA_FILE", "/nowhere/ca.pem"),
    ],
)
def test_gateway_values_that_are_refused(required: dict[str, str], name: str, value: str) -> None:
    """What would break a header, a URL or the JSON is refused by name."""

    assert problem(GatewaySettings, **(required | {name: value})).startswith(f"{name}: ")


def test_sign_path_follows_the_expire_path(required: dict[str, str]) -> None:
    """The signed path is the called one unless it is set."""

    called = required | {"GATEWAY_EXPIRE_PATH": "/x"}

    assert load(GatewaySettings, environ=called, env_file=None).sign_path == "/x"
    signed = called | {"GATEWAY_SIGN_PATH": "/v1.0/x"}
    assert load(GatewaySettings, environ=signed, env_file=None).sign_path == "/v1.0/x"


@pytest.mark.parametrize(
    ("text", "delays"), [("none", ()), ("1", (1,)), (" 1, 20 ,300", (1, 20, 300)), ("60,60,60", (60, 60, 60))]
)
def test_delays(text: str, delays: tuple[int, ...]) -> None:
    """Whole seconds that do not decrease, or `none`; entries may repeat."""

    retry = load(RetrySettings, environ={"RETRY_DELAYS_SECONDS": text}, env_file=None)

    assert retry.delays_seconds == delays


@pytest.mark.parametrize("text", ["0", "2,1", "0,1", "1.5", "1,", "-1", "x", "700000", TOO_MANY])
def test_delays_that_are_refused(text: str) -> None:
    """Fractions, zero and falling delays are refused; so is one beyond a week."""

    assert problem(RetrySettings, RETRY_DELAYS_SECONDS=text).startswith("RETRY_DELAYS_SECONDS: must ")


def test_bounds_that_depend_on_each_other() -> None:
    """A ceiling below its start is refused."""

    assert "below RETRY_INITIAL_SECONDS" in problem(RetrySettings, RETRY_INITIAL_SECONDS="9", RETRY_MAX_SECONDS="8")


def test_certificate_and_key_go_together(key_file: Path) -> None:
    """A client certificate without its key is refused, and the other way round."""

    assert "set both or neither" in problem(AmqpSettings, AMQP_URL="amqps://host", AMQP_CERT_FILE=str(key_file))
    assert "set both or neither" in problem(AmqpSettings, AMQP_URL="amqps://host", AMQP_KEY_FILE=str(key_file))
    assert (
        amqp(AMQP_URL="amqps://host", AMQP_CERT_FILE=str(key_file), AMQP_KEY_FILE=str(key_file)).cert_file == key_file
    )


@pytest.mark.parametrize("prefix", ["amq.x", "with space", "ü", ".dot", "a" * 101, "a/b"])
def test_prefixes_that_are_refused(prefix: str) -> None:
    """A prefix must be able to begin the name of a queue."""

    assert problem(AmqpSettings, AMQP_PREFIX=prefix).startswith("AMQP_PREFIX: must ")


@pytest.mark.parametrize("share", ["0", "1.1", "nan", "-0.5"])
def test_share_is_above_zero_and_at_most_one(share: str) -> None:
    """The sweep's share is a fraction."""

    found = problem(WorkerSettings, WORKER_SWEEP_SHARE=share)

    assert found == "WORKER_SWEEP_SHARE: must be a number above 0 and at most 1"


def test_log_settings_ignore_case() -> None:
    """`LOG_LEVEL=INFO` is what people write."""

    log = load(LogSettings, environ={"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "Json"}, env_file=None)

    assert (log.level, log.format) == ("debug", "json")


def test_bytes_that_are_no_text_are_refused() -> None:
    """A value of the environment that is no UTF-8 is refused instead of failing later."""

    assert problem(AmqpSettings, AMQP_PREFIX="a\udcff") == ("AMQP_PREFIX: is not UTF-8 text; correct its encoding")


# --- secrets stay secret

SECRETS = st.text(min_size=0, max_size=20).map(lambda text: f"{MARK}{text}{MARK}")
VARIABLES = sorted(group.variable(name) for group in GROUPS for name in group.declared())


@given(secret=SECRETS, scheme=st.sampled_from(["amqp", "amqps", "http", ""]))
def test_no_part_of_a_url_with_a_password_is_repeated(secret: str, scheme: str) -> None:
    """Valid or not, a URL's password is in no text of settings or errors."""

    try:
        shown = repr(amqp(AMQP_URL=f"{scheme}://user:{secret}@host:5672/"))
    except SettingsError as error:
        shown = f"{error} {error!r} {error.problems} {error.__context__!r} {error.__cause__!r}"

    assert MARK not in shown


@given(secret=SECRETS, variable=st.sampled_from(VARIABLES))
def test_no_value_in_the_wrong_variable_is_repeated(secret: str, variable: str) -> None:
    """A secret pasted into any variable, right or wrong, is in no error."""

    with pytest.raises(SettingsError) as caught:
        load(environ={variable: secret.replace("\0", "")}, env_file=None)

    assert MARK not in f"{caught.value} {caught.value!r} {caught.value.__context__!r}"


def test_settings_show_no_secret(required: dict[str, str]) -> None:
    """Neither str nor repr of loaded settings holds a secret."""

    settings = load(
        environ=required | {"AMQP_URL": f"amqp://user:{MARK}@host", "GATEWAY_PRIVATE_KEY_PASSPHRASE": MARK},
        env_file=None,
    )

    assert MARK not in f"{settings} {settings!r} {settings.gateway} {settings.amqp!r}"


# --- reference


def test_reference_has_every_setting_once() -> None:
    """The README's table has a row with a meaning for every variable."""

    rows = reference()

    assert [row[0] for row in rows] == list(dict.fromkeys(row[0] for row in rows))
    assert sorted(row[0] for row in rows) == VARIABLES
    assert all(meaning.endswith(".") for _, _, meaning in rows)


def test_reference_shows_defaults_as_they_are_written() -> None:
    """Defaults appear as one would set them."""

    defaults = {variable: default for variable, default, _ in reference()}

    assert defaults["RETRY_DELAYS_SECONDS"] == "`30,300,1800`"
    assert defaults["AMQP_DECLARE"] == "`true`"
    assert defaults["GATEWAY_CLIENT_ID"] == "required"
    assert defaults["AMQP_URL"] == "`amqp://guest:guest@localhost:5672/%2F`"
    assert defaults["GATEWAY_MERCHANT_ID"] == ""


@pytest.mark.parametrize(("failures", "advised"), [("4", True), ("5", False)])
def test_advice_on_a_breaker_that_one_bill_opens(required: dict[str, str], failures: str, advised: bool) -> None:
    """A threshold that one command's attempts reach is reported, with a value that they do not reach."""

    advice = load(environ={**required, "BREAKER_FAILURES": failures}, env_file=None).advice()

    assert [line.partition(":")[0] for line in advice] == ["BREAKER_FAILURES"] * advised
    assert all("5 or more" in line for line in advice)


# --- what the gateway's schemes need


@pytest.mark.parametrize("scheme", ["rsa-sha256", "rsa-sha256-no-token"])
def test_no_secret_where_none_is_used(required: dict[str, str], scheme: str) -> None:
    """Only hmac-sha512 signs with the client secret."""
    del required["GATEWAY_CLIENT_SECRET"]

    settings = load(environ={**required, "GATEWAY_SIGNATURE": scheme}, env_file=None)

    assert settings.gateway.client_secret is None
    with pytest.raises(SettingsError, match="GATEWAY_CLIENT_SECRET: is not set"):
        load(environ=required, env_file=None)


def test_the_key_itself(required: dict[str, str]) -> None:
    """The private key may stand in its variable instead of a file, but not in both."""
    key = Path(required["GATEWAY_PRIVATE_KEY_FILE"]).read_text() or "a key"
    both = {**required, "GATEWAY_PRIVATE_KEY": key}
    alone = {name: value for name, value in both.items() if name != "GATEWAY_PRIVATE_KEY_FILE"}

    gateway = load(environ=alone, env_file=None).gateway

    assert gateway.private_key is not None
    assert (gateway.private_key.get_secret_value(), gateway.private_key_file) == (key, None)
    assert key not in repr(gateway)
    with pytest.raises(SettingsError, match="GATEWAY_PRIVATE_KEY: is set beside GATEWAY_PRIVATE_KEY_FILE"):
        load(environ=both, env_file=None)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"GATEWAY_CERT_FILE": "{file}"}, "GATEWAY_KEY_FILE: goes together with GATEWAY_CERT_FILE"),
        ({"GATEWAY_KEY_FILE": "{file}"}, "GATEWAY_KEY_FILE: goes together with GATEWAY_CERT_FILE"),
        (
            {"GATEWAY_CERT_FILE": "{file}", "GATEWAY_KEY_FILE": "{file}", "GATEWAY_BASE_URL": "http://localhost/v1.0"},
            "GATEWAY_CERT_FILE: is only used with https",
        ),
        ({"GATEWAY_CERT_FILE": "/nowhere", "GATEWAY_KEY_FILE": "{file}"}, "GATEWAY_CERT_FILE: no such file"),
    ],
)
def test_client_certificates_are_pairs(required: dict[str, str], more: dict[str, str], problem: str) -> None:
    """A certificate comes with its key, and is of no use without TLS."""
    file = required["GATEWAY_PRIVATE_KEY_FILE"]
    environ = {**required, "GATEWAY_BASE_URL": "https://gateway.example/v1.0"}

    with pytest.raises(SettingsError, match=problem):
        load(environ=environ | {name: value.format(file=file) for name, value in more.items()}, env_file=None)


def test_oddities_of_secrets_are_advised_about(required: dict[str, str]) -> None:
    """Quotes and blanks around a secret are allowed, seldom meant, and reported without the secret."""

    advice = load(environ={**required, "GATEWAY_CLIENT_SECRET": '"hush"'}, env_file=None).advice()

    assert [line.partition(":")[0] for line in advice] == ["GATEWAY_CLIENT_SECRET"]
    assert "quotes" in advice[0]
    assert "hush" not in advice[0]
