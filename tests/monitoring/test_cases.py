"""The alerts' cases notice a changed alert: another threshold, no `for`, a clause left out."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.monitoring import cases, rules

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tools")]

Rule = dict[str, Any]


def mutants(rule: Rule) -> Iterator[tuple[str, Rule]]:
    """The rule with one thing changed, and what. Comparisons with zero have no third and no threefold."""
    expr: str = rule["expr"]
    for found in re.finditer(r"[<>]=? ([\d.]+(?: \* [\d.]+)?)", expr):
        for change in ("* 3", "/ 3"):
            if float(found[1].split()[0]):
                changed = f"{expr[: found.start(1)]}({found[1]}) {change}{expr[found.end(1) :]}"
                yield f"{found[0]} {change}", {**rule, "expr": changed}
    first, *clauses = re.split(r"\n\s*(?=(?:and|unless) )", expr)
    for clause in clauses:
        yield f"without: {clause.strip()}", {**rule, "expr": "\n".join([first, *(c for c in clauses if c != clause)])}
    if "for" in rule:
        for duration in ("0s", "20h"):
            yield f"for {duration}", {**rule, "for": duration}


def passes(alert: str, mutant: Rule, directory: Path) -> bool:
    """Whether the alert's cases see no difference."""
    groups = copy.deepcopy(rules.read())
    for group in groups:
        group["rules"] = [mutant if rule.get("alert") == alert else rule for rule in group["rules"]]
    files = cases.write(directory, alert, groups)
    done = subprocess.run(["promtool", "test", "rules", *files], capture_output=True, text=True, check=False)
    # A mutant that is no rule at all would be noticed by nobody's merit.
    assert done.returncode == 0 or "FAILED" in done.stderr, done.stdout + done.stderr
    return done.returncode == 0


@pytest.mark.parametrize(
    "rule", [r for g in rules.read() for r in g["rules"] if "alert" in r], ids=lambda r: r["alert"]
)
def test_cases_notice(rule: Rule, tmp_path: Path) -> None:
    """No changed alert passes the cases of the alert; the alert as it is does."""

    assert passes(rule["alert"], rule, tmp_path)
    assert [what for what, mutant in mutants(rule) if passes(rule["alert"], mutant, tmp_path)] == []
