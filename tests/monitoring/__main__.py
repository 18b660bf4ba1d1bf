"""Makes what is made from sources, and shows it.

python -m tests.monitoring generate   PrometheusRule, AlertmanagerConfig and dashboard.json in k8s/base
python -m tests.monitoring cases      the alerts' test cases, as files for `promtool test rules`
python -m tests.monitoring pages      the status page in five situations
python -m tests.monitoring picture    the dashboard, drawn from a load with faults on real servers
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.monitoring import cases, dashboard, rules


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.monitoring", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="make the PrometheusRule and the dashboard's JSON again")
    generate.add_argument("--prefix", default=rules.PREFIX, help="AMQP_PREFIX of the workers (%(default)s)")
    generate.add_argument(
        "--runbooks", default=rules.RUNBOOKS, help="address of the runbook, before the # (%(default)s)"
    )
    generate.add_argument(
        "--dashboard", default=rules.DASHBOARD, help="address of the dashboard, before the ? (%(default)s)"
    )
    write = commands.add_parser("cases", help="write the alerts' test cases as files for promtool test rules")
    write.add_argument("directory", type=Path)
    pages = commands.add_parser("pages", help="draw the status page in five situations; needs Chromium")
    pages.add_argument("directory", type=Path)
    picture = commands.add_parser(
        "picture", help="run a load with faults for 90 s and draw the dashboard; needs matplotlib"
    )
    picture.add_argument("file", type=Path, help="a PNG")
    wish = parser.parse_args()
    match wish.command:
        case "generate":
            rules.MANIFEST.write_text(rules.manifest(wish.prefix, wish.runbooks, wish.dashboard))
            dashboard.write(prefix=wish.prefix, runbooks=wish.runbooks)
            rules.ALERTMANAGER_MANIFEST.write_text(rules.alertmanager_manifest())
            print(f"{rules.MANIFEST}\n{rules.ALERTMANAGER_MANIFEST}\n{dashboard.MANIFEST}")
        case "cases":
            for path in write_cases(wish.directory):
                print(path)
        case "pages":
            return _pages(wish.directory)
        case "picture":
            return _picture(wish.file)
    return 0


def write_cases(directory: Path) -> list[Path]:
    """The files for `promtool test rules`."""
    return [path for alert in rules.alerts() for path in cases.write(directory, alert.name)]


def _pages(directory: Path) -> int:
    from tests.browser import BrowserUnavailable
    from tests.monitoring import pages

    directory.mkdir(exist_ok=True)
    try:
        for path in pages.draw(directory, lambda _: None):
            print(path)
    except BrowserUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _picture(file: Path) -> int:
    try:
        from tests.monitoring import picture
    except ModuleNotFoundError as error:
        print(
            f"{error.name} is not installed; it is no requirement of the tests: pip install matplotlib", file=sys.stderr
        )
        return 1
    from tests.monitoring.live import load_with_faults

    with tempfile.TemporaryDirectory(prefix="qris-expire-monitoring-") as directory:
        file.write_bytes(picture.draw(load_with_faults(Path(directory))))
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
