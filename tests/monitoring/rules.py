"""The rules: read from their one source, and told as a PrometheusRule."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
SOURCE: Final = ROOT / "k8s" / "monitoring" / "rules.yaml"
MANIFEST: Final = ROOT / "k8s" / "base" / "prometheusrule.yaml"
RUNBOOK: Final = ROOT / "k8s" / "RUNBOOK.md"

PREFIX: Final = "qris.expire"
RUNBOOKS: Final = "https://git.example/qris-expire-worker/k8s/RUNBOOK.md"
DASHBOARD: Final = "https://grafana.example/d/qris-expire-worker"
"""Where an alert's links lead, before the `#` and the `?`: placeholders for addresses of the operators' own."""

_HEAD: Final = """\
# Made from ../monitoring/rules.yaml by `python -m tests.monitoring generate`; change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: qris-expire
spec:
"""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert as the source has it."""

    name: str
    expr: str
    severity: str
    annotations: dict[str, str]


def read(path: Path = SOURCE) -> list[dict[str, Any]]:
    """The groups."""
    groups: list[dict[str, Any]] = yaml.safe_load(path.read_text())["groups"]
    return groups


def alerts() -> list[Alert]:
    """All alerts, in the order of the source."""
    return [
        Alert(rule["alert"], rule["expr"], rule["labels"]["severity"], rule["annotations"])
        for group in read()
        for rule in group["rules"]
        if "alert" in rule
    ]


def expressions() -> list[str]:
    """Every expression, those of recording rules included."""
    return [rule["expr"] for group in read() for rule in group["rules"]]


def recorded() -> set[str]:
    """The series that recording rules make."""
    return {rule["record"] for group in read() for rule in group["rules"] if "record" in rule}


def manifest(prefix: str = PREFIX, runbooks: str = RUNBOOKS, dashboard: str = DASHBOARD) -> str:
    """The PrometheusRule: the source's own text, comments and all, one level deeper."""
    source = SOURCE.read_text()
    text = source[source.index("groups:") :]
    text = text.replace(f'"{PREFIX}.', f'"{prefix}.').replace(f" {RUNBOOKS}#", f" {runbooks}#")
    text = text.replace(f" {DASHBOARD}?", f" {dashboard}?")
    return _HEAD + "".join(f"  {line}" if line.strip() else line for line in text.splitlines(keepends=True))
