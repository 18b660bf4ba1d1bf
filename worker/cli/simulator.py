"""`qris-expire simulator`: the gateway, simulated, until it is told to stop."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from worker import signals
from worker.cli import INVALID, Trouble
from worker.cli.command_line import Option
from worker.cli.screen import output

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    from worker.sandbox.simulator import Script, Simulator, SimulatorReport

OWN_KEY_FILE = Path("simulator-key.pem")


@dataclass(frozen=True, slots=True)
class Changes:
    """What of the script another value takes the place of."""

    single_token: Annotated[bool | None, Option(help="A new token makes the old one invalid.")] = None
    token_lifetime: Annotated[
        float | None, Option(help="Seconds for which a token is valid; 900 unless the script says otherwise.", min=0)
    ] = None
    latency: Annotated[float | None, Option(help="Seconds that every answer takes.", min=0)] = None
    requests_per_second: Annotated[
        float | None, Option(help="Answer expire calls beyond this rate with 4299300.", min=0)
    ] = None


def simulator(
    host: Annotated[str, Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(help="The port to listen on; 0 takes a free one.", min=0, max=65535)] = 8093,
    key_file: Annotated[
        Path | None,
        Option(help="PEM with the client's key, public or private; else simulator-key.pem, made if missing."),
    ] = None,
    client_id: Annotated[str, Option(help="The only client id that it accepts.")] = "demo-client",
    client_secret: Annotated[str, Option(help="The client's secret.")] = "demo-secret",
    channel_id: Annotated[str, Option(help="The client's channel id.")] = "95051",
    signature: Annotated[str, Option(help="hmac-sha512, rsa-sha256 or rsa-sha256-no-token.")] = "hmac-sha512",
    sign_path: Annotated[str, Option(help="The path that expire calls sign.")] = "/qr/qr-mpm-expire-billnumber",
    script: Annotated[Path | None, Option(help="JSON file that says which calls fail, and how (see above).")] = None,
    changes: Changes = Changes(),
) -> None:
    """Simulates the gateway: it checks signatures, tokens and duplicate external ids, and plays scripted faults.

    It prints the settings with which a worker talks to it, serves until SIGINT or SIGTERM, and then prints what it saw.
    Meanwhile GET /_simulator/report shows the same, and POST /_simulator/script replaces the script. Neither asks for a
    password, so do not open --host to others.

    A script is a JSON object. These members hold faults:

        bills         {"10092081": [FAULT, FAULT]}: the first call for this bill gets the first fault, and so on
        patterns      [{"match": "^BAD", "faults": [FAULT]}]: the same for every bill that the expression matches
        rates         [{"share": 0.05, "fault": FAULT}]: this share of all other expire calls gets the fault
        token_faults  [FAULT, FAULT]: for calls of the token service, in order

    A fault is {} (success), or has one of code (with message and http), html, body, hang (seconds) and reset ("before"
    or "after" it took effect). To each may be added latency, trickle (seconds), retry_after, close, applied and repeat.

    These members concern all calls: seed, down, latency, requests_per_second, single_token, token_lifetime,
    kill_token_every, expires_in, skew, clock_offset and already.

    Examples:

        qris-expire simulator
        qris-expire simulator --port 8100 --script faults.json

        {"bills": {"10092081": [{"code": "5009300"}, {"reset": "after"}]},
         "patterns": [{"match": "^PAID", "faults": [{"code": "4049314", "message": "Paid Bill", "repeat": true}]}],
         "rates": [{"share": 0.05, "fault": {"code": "5009300"}}],
         "token_faults": [{"code": "4017300"}], "latency": 0.05}
    """
    from worker.sandbox.simulator import Simulator

    try:
        public_key, private_key_file = _key(key_file)
        gateway = Simulator(
            _script(script, changes),
            host=host,
            port=port,
            client_id=client_id,
            client_secret=client_secret,
            channel_id=channel_id,
            public_key=public_key,
            signature=signature,
            sign_path=sign_path,
        )
        signals.install()
        with gateway:
            _print_settings(gateway, private_key_file)
            signals.wait()
    except OSError as error:
        if error.filename:
            raise Trouble(f"{error.filename}: {error.strerror}; give another file", code=INVALID) from None
        where = f"cannot listen on {host}:{port} ({error.strerror})"
        raise Trouble(f"{where}; give --port a free one, or --port 0", code=INVALID) from None
    except ValueError as error:
        raise Trouble(str(error), code=INVALID) from None
    _print_report(gateway.report(bills=False))


def _script(path: Path | None, changes: Changes) -> Script:
    from worker.sandbox.simulator import Script

    script = Script.load(path) if path else Script()
    return replace(script, **{name: value for name, value in asdict(changes).items() if value is not None})


def _key(path: Path | None) -> tuple[RSAPublicKey, Path | None]:
    """The client's public key, and the file of the private one unless only the public one was given."""
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    from worker.sandbox.simulator import own_key, private_pem, write_private

    if path is None:
        path = OWN_KEY_FILE
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, which is not followed; remove it, or give --key-file")
        if not path.exists():
            write_private(path, private_pem(own_key()))
    pem = path.read_bytes()
    private = b"PRIVATE KEY" in pem
    try:
        key = load_pem_private_key(pem, password=None).public_key() if private else load_pem_public_key(pem)
    except TypeError:
        raise ValueError(f"{path} has a passphrase; give the public key instead") from None
    except ValueError:
        kinds = "private key; give an RSA key" if private else "key; give an RSA key, public or private,"
        raise ValueError(f"{path} is no readable {kinds} in PEM form") from None
    if isinstance(key, RSAPublicKey):
        return key, path if private else None
    raise ValueError(f"{path} is no RSA key; the gateway knows RSA only")


def _print_settings(gateway: Simulator, private_key_file: Path | None) -> None:
    settings = gateway.environment(private_key_file or Path("the private key of --key-file"))
    for name, value in settings.items():
        if name == "GATEWAY_PRIVATE_KEY_FILE" and private_key_file is None:
            print(f"# export {name}=…  the private key that belongs to --key-file")
        else:
            print(f"export {name}={shlex.quote(value)}")
    print("# ready; ctrl-C ends it")
    sys.stdout.flush()


def _print_report(report: SimulatorReport) -> None:
    """Each section adds up: the calls, then what they were answered."""
    from rich.table import Table

    table = Table("what the simulator saw", "count", title="simulator", title_justify="left")
    table.columns[1].justify = "right"
    for calls, count, answers in (
        ("expire calls", report.expire_calls, report.by_code),
        ("token calls", report.token_calls, report.token_by_code),
    ):
        table.add_row(calls, f"{count:,}")
        for code, number in answers.items():
            table.add_row(f"  answered {code}", f"{number:,}")
        table.add_section()
    facts = {
        "bills called": report.bills_called,
        "bills expired": report.bills_expired,
        "duplicate external ids": report.duplicates,
        "wrong signatures": report.signature_failures,
        "calls above the rate": report.throttled,
        "most calls at once": report.max_concurrency,
        "most calls in one second": report.peak_per_second,
        "connections turned away (down)": report.turned_away,
    }
    for name, number in facts.items():
        table.add_row(name, f"{number:,}")
    output().print(table)
