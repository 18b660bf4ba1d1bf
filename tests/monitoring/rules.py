"""The rules: read from their one source, and written as a PrometheusRule."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
SOURCE: Final = ROOT / "k8s" / "monitoring" / "rules.yaml"
MANIFEST: Final = ROOT / "k8s" / "base" / "prometheusrule.yaml"
ALERTMANAGER: Final = ROOT / "k8s" / "monitoring" / "alertmanager.yaml"
ALERTMANAGER_MANIFEST: Final = ROOT / "k8s" / "base" / "alertmanagerconfig.yaml"
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


def alertmanager_manifest() -> str:
    """The AlertmanagerConfig: the example's route and inhibitions; its receivers are webhooks from a Secret."""
    config = yaml.safe_load(ALERTMANAGER.read_text())
    spec = {
        "route": _route(config["route"]),
        "inhibitRules": [
            {
                "sourceMatch": [_matcher(each) for each in rule["source_matchers"]],
                "targetMatch": [_matcher(each) for each in rule["target_matchers"]],
                "equal": rule["equal"],
            }
            for rule in config["inhibit_rules"]
        ],
        "receivers": [_receiver(receiver) for receiver in config["receivers"]],
    }
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1alpha1",
        "kind": "AlertmanagerConfig",
        "metadata": {"name": "qris-expire"},
        "spec": spec,
    }
    text: str = yaml.safe_dump(manifest, sort_keys=False, width=120)
    return _ALERTMANAGER_HEAD + text


_ALERTMANAGER_HEAD: Final = """\
# Made from ../monitoring/alertmanager.yaml by `python -m tests.monitoring generate`; change it there.
"""


def _route(route: dict[str, Any]) -> dict[str, Any]:
    names = {"group_by": "groupBy", "group_wait": "groupWait", "group_interval": "groupInterval"}
    names |= {"repeat_interval": "repeatInterval", "receiver": "receiver"}
    found: dict[str, Any] = {names[name]: value for name, value in route.items() if name in names}
    if "matchers" in route:
        found["matchers"] = [_matcher(each) for each in route["matchers"]]
    if "routes" in route:
        found["routes"] = [_route(each) for each in route["routes"]]
    return found


def _matcher(text: str) -> dict[str, str]:
    """Always a pattern, which matches as a whole: a bare `=` is a type of its own in YAML 1.1."""
    found = re.fullmatch(r'(\w+)=~?"(.*)"', text)
    assert found is not None, text
    return {"name": found[1], "matchType": "=~", "value": found[2]}


def _receiver(receiver: dict[str, Any]) -> dict[str, Any]:
    if "webhook_configs" not in receiver:
        return {"name": receiver["name"]}
    url = {"name": "qris-expire-alerts", "key": receiver["name"]}
    return {"name": receiver["name"], "webhookConfigs": [{"urlSecret": url}]}
