"""The dashboard as a file: valid, complete, and asking for what exists."""

import itertools
import json
import re
from typing import Any

import promql_parser
import pytest

from tests.monitoring import dashboard, rules
from tests.monitoring.metrics import counters, exported, grouped, wrong
from tests.monitoring.schemas import faults

MODEL: dict[str, Any] = json.loads(dashboard.MANIFEST.read_text())
PANELS = [panel for panel in MODEL["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = pytest.mark.parametrize("expr", [expr for _, expr in QUERIES], ids=[title for title, _ in QUERIES])

ROWS = (
    "At a glance",
    "Lanes and ages",
    "The fleet",
    "By pod",
    "Outcomes by reason",
    "Gateway",
    "Retries, breaker, token",
    "Confirms and broker",
    "Dead letters",
    "Saturation",
    "A sweep in progress",
)


def replaced(expr: str) -> str:
    """With Grafana's variables filled in."""
    fixed = {"$__rate_interval": "1m", "$__range": "1h", "$prefix": "qris.expire"}
    chosen = dict.fromkeys(("$namespace", "$job", "$pod"), ".*")
    for name, value in (fixed | chosen).items():
        expr = expr.replace(name, value)
    return expr


def test_up_to_date() -> None:
    """Making the dashboard again gives the same bytes; if not: python -m tests.monitoring generate."""

    assert dashboard.MANIFEST.read_text() == dashboard.text()


def test_valid() -> None:
    """Grafana's own schema of dashboards finds nothing wrong, and does find what is."""

    schema = "grafana/dashboard.schema.json"
    assert faults(schema, MODEL) == []
    assert faults(schema, {**MODEL, "panels": [{**PANELS[0], "tittle": "x"}]})


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_valid(panel: dict[str, Any]) -> None:
    """Queries and lines are as Grafana's schemas of Prometheus queries and time series have them."""

    for target in panel["targets"]:
        assert faults("grafana/prometheus.schema.json", target) == []
        assert faults("grafana/prometheus.schema.json", {**target, "format": "timeseries"})
    if panel["type"] == "timeseries":
        custom = panel["fieldConfig"]["defaults"]["custom"]
        assert faults("grafana/timeseries.schema.json", panel["options"], "Options") == []
        assert faults("grafana/timeseries.schema.json", custom, "FieldConfig") == []
        assert faults("grafana/timeseries.schema.json", {**custom, "drawStyle": "lines"}, "FieldConfig")


def test_rows() -> None:
    """The rows are those that an SRE reads down, and none is empty."""

    assert tuple(panel["title"] for panel in MODEL["panels"] if panel["type"] == "row") == ROWS
    assert all(row.panels for row in dashboard.ROWS)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_explains_itself(panel: dict[str, Any]) -> None:
    """A panel has a title, a description, a unit, queries with legends, and the data source of the choice."""

    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert all(target["legendFormat"] for target in panel["targets"])


def test_ids_are_unique() -> None:
    """No two panels, and no two queries of a panel, have one id."""

    ids = [panel["id"] for panel in MODEL["panels"]]
    assert len(set(ids)) == len(ids)
    assert 0 not in ids
    for panel in PANELS:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_panels_do_not_overlap() -> None:
    """Every panel has its own place within the 24 columns."""

    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        columns, lines = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        return set(itertools.product(columns, lines))

    places = [cells(panel) for panel in MODEL["panels"]]
    assert sum(map(len, places)) == len(set().union(*places))
    assert max(x for place in places for x, _ in place) < 24


@EXPRESSIONS
def test_queries_parse(expr: str) -> None:
    """A query is PromQL once its variables are filled in, and no variable is left."""

    assert "$" not in replaced(expr)
    assert promql_parser.parse(replaced(expr))


def test_queries_ask_for_what_exists() -> None:
    """Every metric, label and label value of the queries is exported: this is what a rename meets."""

    known = exported()
    labels = {label for each in known.values() for label in each} | {"queue", "namespace", "job", "pod", "instance"}
    for _, expr in QUERIES:
        assert grouped(expr) <= labels
    assert [f"{title}: {fault}" for title, expr in QUERIES for fault in wrong(replaced(expr), known)] == []
    assert list(wrong('rate(qris_expire_outcomes_totals{lane="sweep"}[1m])', known))
    assert list(wrong('rate(qris_expire_outcomes_total{lane="sweeps"}[1m])', known))
    assert list(wrong('rate(qris_expire_outcomes_total{bill="1"}[1m])', known))


def test_legends_name_labels_that_are_there() -> None:
    """A label in a legend is one that its query keeps."""

    for panel in PANELS:
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped(target["expr"])


def test_queries_choose_the_job() -> None:
    """Every metric of the worker is asked for with the chosen workers, every queue with namespace and prefix."""

    for _, expr in QUERIES:
        chosen = 'namespace=~"$namespace", job=~"$job", pod=~"$pod"'
        assert all(chosen in one for one in re.findall(r"qris_expire_\w+(?:{[^}]*})?", expr))
        queue = '{namespace=~"$namespace", queue=~"$prefix.'
        assert all(queue in one for one in re.findall(r"rabbitmq_\w+(?:{[^}]*})?", expr))


@EXPRESSIONS
def test_counters_are_rated(expr: str) -> None:
    """A counter is only shown as a rate over Grafana's own interval, or as an increase over the time range."""

    for name, function, window in counters(expr):
        assert (function, window) in {("rate", "$__rate_interval"), ("increase", "$__range")}, name


@pytest.mark.parametrize("annotation", MODEL["annotations"]["list"], ids=lambda each: each["name"])
def test_annotations_ask_for_what_exists(annotation: dict[str, Any]) -> None:
    """A mark is asked for from the chosen data source, by a query that parses, and names labels that it keeps."""

    assert annotation["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert list(wrong(replaced(annotation["expr"]), exported())) == []
    kept = grouped(annotation["expr"]) or {"namespace", "pod", "instance"}
    assert set(re.findall(r"{{(\w+)}}", annotation["textFormat"])) <= kept


def test_marks() -> None:
    """The graphs are marked where a breaker opened, the leader changed, and a version came."""

    assert [each["name"] for each in MODEL["annotations"]["list"]] == ["Breaker opened", "Leader changed", "Rollout"]


def test_the_runbook_is_one_click_away() -> None:
    """The dashboard links to the runbook, by the same address as the alerts."""

    assert [link["url"] for link in MODEL["links"]] == [rules.RUNBOOKS]


def test_variables() -> None:
    """What can be chosen: data source, namespace, jobs, pod, prefix of the queues."""

    names = [variable["name"] for variable in MODEL["templating"]["list"]]
    assert names == ["datasource", "namespace", "job", "pod", "prefix"]
