"""The alerts: sound, each proven to fire and to keep silent, and the same in both of their forms."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.monitoring import rules
from tests.monitoring.__main__ import write_cases
from tests.monitoring.cases import CASES
from tests.monitoring.metrics import counters, exported, grouped, wrong
from tests.monitoring.programs import alertmanager, run
from tests.monitoring.schemas import faults
from tests.waiting import wait_until
from worker.core.catalogue import AGE_BUCKETS
from worker.core.lanes import LANES
from worker.core.topology import Names
from worker.settings import AmqpSettings

MONITORING = rules.SOURCE.parent
ALERTS = rules.alerts()


@pytest.mark.usefixtures("tools")
def test_rules_are_sound() -> None:
    """promtool finds nothing wrong with the rules, and nothing to repair."""

    assert "SUCCESS" in run("promtool", "check", "rules", "--lint=all", "--lint-fatal", rules.SOURCE)


@pytest.mark.usefixtures("tools")
def test_cases(tmp_path: Path) -> None:
    """Every alert fires where it should, with these labels and this text, and is silent where it should be."""

    assert "FAILED" not in run("promtool", "test", "rules", *write_cases(tmp_path))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_has_both_cases(alert: rules.Alert) -> None:
    """No alert lacks a case in which it fires, or one in which it is silent."""

    fires = [case.fires is not None for case in CASES if case.alert == alert.name]
    assert True in fires
    assert False in fires


def test_no_case_without_its_alert() -> None:
    """Each case is one of an alert that exists: a silent case of another would prove nothing."""

    assert {case.alert for case in CASES} == {alert.name for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_says_what_to_do(alert: rules.Alert) -> None:
    """Summary, meaning, action and a link to a section of the runbook that exists; page or ticket."""

    assert alert.severity in ("page", "ticket", "info")
    assert set(alert.annotations) == {"summary", "description", "action", "runbook_url", "dashboard_url"}
    assert all(len(text) >= 20 for text in alert.annotations.values())
    # The cases take these from the source as they are, so a template in them would go untested.
    assert "{{" not in alert.annotations["description"] + alert.annotations["action"]
    assert alert.annotations["runbook_url"] == f"{rules.RUNBOOKS}#{alert.name.lower()}"
    assert alert.annotations["dashboard_url"] == f"{rules.DASHBOARD}?var-namespace={{{{ $labels.namespace }}}}"
    assert f"\n## {alert.name}\n" in rules.RUNBOOK.read_text()


def test_rules_ask_for_what_exists() -> None:
    """Every metric, label and label value of the rules is exported by the worker, or known of others."""

    known = exported()
    labels = {label for each in known.values() for label in each}
    labels |= {"namespace", "job", "pod", "instance", "vhost", "queue", "cronjob", "job_name"}
    assert set().union(*map(grouped, rules.expressions())) <= labels
    assert [fault for expr in rules.expressions() for fault in wrong(expr, known)] == []


def test_rules_ask_for_what_is_recorded() -> None:
    """Every recorded series in an alert is recorded, and each that is recorded is used."""

    used = {name for alert in ALERTS for name in re.findall(r"job:\w+:\w+", alert.expr)}
    assert used == rules.recorded()


def test_counters_are_rated() -> None:
    """A counter is only looked at through rate or increase: its value means nothing by itself."""

    functions = {function for expr in rules.expressions() for _, function, _ in counters(expr)}
    assert functions == {"rate", "increase"}


def test_the_objective_is_a_boundary() -> None:
    """The objective's second is a bucket of the histogram: between two of them it could only be guessed."""

    assert {float(le) for expr in rules.expressions() for le in re.findall(r'le="([\d.]+)"', expr)} == {1.0}
    assert 1.0 in AGE_BUCKETS


def test_queues_are_those_of_the_default_prefix() -> None:
    """The rules name the queues as the worker declares them by default."""

    assert AmqpSettings.declared()["prefix"].default == rules.PREFIX
    names = Names(rules.PREFIX)
    wanted = {*(names.queue(lane) for lane in LANES), names.dead, names.unrouted}
    patterns = {p for expr in rules.expressions() for p in re.findall(r'queue=~?"([^"]+)"', expr)}
    assert all(any(re.fullmatch(pattern, name) for name in wanted) for pattern in patterns)
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in wanted)
    assert not any(re.fullmatch(pattern, names.retry(lane, 30)) for pattern in patterns for lane in LANES)


def test_the_prometheusrule_is_up_to_date() -> None:
    """Making the PrometheusRule again gives the same bytes; if not: python -m tests.monitoring generate."""

    assert rules.MANIFEST.read_text() == rules.manifest()


def test_the_prometheusrule_holds_the_rules() -> None:
    """The PrometheusRule's groups are the source's, value by value."""

    assert yaml.safe_load(rules.MANIFEST.read_text())["spec"] == {"groups": rules.read()}


def test_the_prometheusrule_is_valid() -> None:
    """The operator's schema finds nothing wrong, and does find what is."""

    schema = "monitoring.coreos.com/prometheusrule_v1.json"
    document = yaml.safe_load(rules.MANIFEST.read_text())
    assert faults(schema, document) == []
    document["spec"]["groups"][0]["rules"][0]["expression"] = "1"
    assert faults(schema, document)


def test_another_prefix_and_another_runbook() -> None:
    """A generated PrometheusRule has the queues, the runbook and the dashboard that were asked for, everywhere."""

    text = rules.manifest("shop.expire", "https://wiki.test/qris", "https://grafana.test/d/qris")
    assert '"qris.expire.' not in text
    assert text.count('queue=~"shop.expire.(cancellation|sweep)"') == 2
    assert text.count("runbook_url: https://wiki.test/qris#") == len(ALERTS)
    assert text.count("dashboard_url: https://grafana.test/d/qris?") == len(ALERTS)
    assert ".example" not in text


@pytest.mark.usefixtures("tools")
def test_example_configurations() -> None:
    """Prometheus and Alertmanager accept the examples; a page goes to the pager and a ticket to the tickets."""

    alertmanager = MONITORING / "alertmanager.yaml"
    assert "SUCCESS" in run("promtool", "check", "config", MONITORING / "prometheus.yaml")
    assert "SUCCESS" in run("amtool", "check-config", alertmanager)
    for severity, receiver in (("page", "pager"), ("ticket", "tickets")):
        told = run("amtool", "config", "routes", "test", f"--config.file={alertmanager}", f"severity={severity}")
        assert receiver in told.splitlines()


def test_the_alertmanagerconfig_is_up_to_date() -> None:
    """Making the AlertmanagerConfig again gives the same bytes; if not: python -m tests.monitoring generate."""

    assert rules.ALERTMANAGER_MANIFEST.read_text() == rules.alertmanager_manifest()


def test_the_alertmanagerconfig_says_what_the_example_says() -> None:
    """Every route, matcher, inhibition and receiver of the example is there, and each webhook comes from the Secret."""

    example = yaml.safe_load(rules.ALERTMANAGER.read_text())
    spec = yaml.safe_load(rules.ALERTMANAGER_MANIFEST.read_text())["spec"]

    def text(matchers: list[dict[str, str]]) -> list[str]:
        return [f'{each["name"]}{each["matchType"]}"{each["value"]}"' for each in matchers]

    def patterns(matchers: list[str]) -> list[str]:
        return [re.sub(r'^(\w+)="', r'\1=~"', each) for each in matchers]

    assert [(text(rule["sourceMatch"]), text(rule["targetMatch"]), rule["equal"]) for rule in spec["inhibitRules"]] == [
        (patterns(rule["source_matchers"]), patterns(rule["target_matchers"]), rule["equal"])
        for rule in example["inhibit_rules"]
    ]
    assert [(route["receiver"], text(route["matchers"])) for route in spec["route"]["routes"]] == [
        (route["receiver"], patterns(route["matchers"])) for route in example["route"]["routes"]
    ]
    assert [receiver["name"] for receiver in spec["receivers"]] == [each["name"] for each in example["receivers"]]
    keys = {each["urlSecret"]["key"] for one in spec["receivers"] for each in one.get("webhookConfigs", [])}
    (secret,) = (
        each
        for each in yaml.safe_load_all((rules.ROOT / "k8s" / "secrets.example.yaml").read_text())
        if each["metadata"]["name"] == "qris-expire-alerts"
    )
    assert keys == set(secret["stringData"])


def test_inhibitions_name_alerts() -> None:
    """Whatever silences and whatever is silenced exists."""

    names = {alert.name for alert in ALERTS}
    for rule in yaml.safe_load((MONITORING / "alertmanager.yaml").read_text())["inhibit_rules"]:
        for matcher, *_ in (rule["source_matchers"], rule["target_matchers"]):
            pattern = re.fullmatch(r'alertname=~?"(.+)"', matcher)
            assert pattern
            assert any(re.fullmatch(pattern[1], name) for name in names)


SILENCED = (
    ("BreakerOpen lane=cancellation", "Backlog lane=cancellation"),
    ("BreakerOpen lane=sweep", "Backlog lane=sweep"),
    ("BreakerOpen lane=cancellation", "QueueGrows lane=cancellation"),
    ("BreakerOpen lane=cancellation", "CommandOld"),
    ("Throttled", "Backlog lane=sweep"),
    ("Throttled", "ObjectiveBurns"),
    ("BrokerBlocked", "QueueGrows lane=cancellation"),
    ("WorkerAbsent", "QueueWithoutConsumer lane=cancellation"),
    ("WorkerAbsent", "WorkersMissing"),
    ("PublishesUnconfirmed", "Backlog lane=cancellation"),
    ("Backlog lane=cancellation", "QueueGrows lane=cancellation"),
    ("Backlog lane=cancellation", "ObjectiveBurnsFast"),
)
"""What somebody is paged for, and what only follows from it."""

LOUD = (
    ("BreakerOpen lane=sweep", "Backlog lane=cancellation"),
    ("BreakerOpen lane=sweep", "QueueGrows lane=cancellation"),
    ("BreakerOpen lane=sweep", "ObjectiveBurnsFast"),
    ("BreakerOpen lane=sweep", "CommandOld"),
    ("Backlog lane=sweep", "ObjectiveBurnsFast"),
    ("Backlog lane=sweep", "QueueGrows lane=cancellation"),
    ("Recovering", "Backlog lane=cancellation"),
    ("Recovering", "QueueGrows lane=cancellation"),
    ("WorkersMissing", "QueueWithoutConsumer lane=sweep"),
)
"""What is paged for beside the first one."""


@pytest.mark.usefixtures("tools")
def test_who_silences_whom(tmp_path: Path) -> None:
    """A consequence is silent beside its cause, of its own environment and lane only; with or without namespaces."""

    def add(alert: str, namespace: str) -> tuple[str, ...]:
        name, *labels = f"QrisExpire{alert}".split()
        return (f"alertname={name}", *labels, *([f"namespace={namespace}"] if namespace else []))

    pairs = [(*pair, f"here-{number}", f"here-{number}") for number, pair in enumerate((*SILENCED, *LOUD))]
    pairs += [(*pair, f"there-{number}", f"elsewhere-{number}") for number, pair in enumerate(SILENCED)]
    pairs += [("BreakerOpen lane=cancellation", "QueueGrows lane=cancellation", "", "")]
    wanted = ["suppressed"] * len(SILENCED) + ["active"] * (len(LOUD) + len(SILENCED)) + ["suppressed"]
    config = yaml.safe_load((MONITORING / "alertmanager.yaml").read_text())
    for receiver in config["receivers"]:
        receiver.pop("webhook_configs", None)
    with alertmanager(tmp_path, config) as manager:
        for cause, victim, here, there in pairs:
            for labels in (add(cause, here), add(victim, there)):
                run("amtool", f"--alertmanager.url=http://127.0.0.1:{manager.port}", "alert", "add", *labels)

        def states() -> list[str]:
            told = {
                frozenset(f"{name}={value}" for name, value in each["labels"].items()): each["status"]["state"]
                for each in manager.get("/api/v2/alerts")
            }
            return [told.get(frozenset(add(victim, there)), "") for _, victim, _, there in pairs]

        with suppress(AssertionError):  # the next line says which are not
            wait_until(lambda: states() == wanted, 15, "all are as they should be")
        assert dict(zip(pairs, states(), strict=True)) == dict(zip(pairs, wanted, strict=True))
