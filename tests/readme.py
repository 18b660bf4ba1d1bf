"""The generated parts of the README and of the pages beside it: ``python -m tests.readme`` writes them.

A table follows ``<!-- table: NAME -->`` and comes from the data that the worker itself uses; a program follows
``<!-- snippet: FILE -->`` and is the file of tests/snippets that is run against a broker.
"""

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import yaml

from worker.core.outcome import DEAD_LETTERED, REASONS
from worker.core.verdict import BARE_RULES, RULES, SUCCESS, Kind, NoReply, Reply, Rule, Verdict, judge
from worker.settings import reference

ROOT: Final = Path(__file__).parents[1]
README: Final = ROOT / "README.md"
RUNBOOK: Final = ROOT / "k8s" / "RUNBOOK.md"
PAGES: Final = (README, *sorted((ROOT / "worker" / "manual").glob("*.md")), RUNBOOK)
"""What a reader is led through; every test of a page holds for each of them."""
SNIPPETS: Final = ROOT / "tests" / "snippets"
ALERTS: Final = ROOT / "k8s" / "monitoring" / "rules.yaml"

ACTS: Final[Mapping[Kind, str]] = {
    Kind.DONE: "publishes",
    Kind.REFUSED: "publishes",
    Kind.TOKEN: "fetches a new token, sends it again at once",
    Kind.ID_CLASH: "sends it again at once, with another id",
    Kind.THROTTLED: "holds *all* calls for `Retry-After`, else a backoff; then sends it again",
    Kind.LATER: "ends the round: the next try is a delayed retry; the breaker does not count it",
    Kind.TRANSIENT: "sends it again after a backoff; the breaker counts it",
    Kind.SYSTEMIC: "sends it again after a backoff; the breaker counts it; after the last round: `credentials`",
}

_TABLE: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=\n\n|\n?\Z)", re.DOTALL)
_SNIPPET: Final = re.compile(r"(<!-- snippet: (\S+) -->\n```\w+\n).*?\n?(?=```\n)", re.DOTALL)


def made(page: str) -> str:
    """``page`` with every table and every program as its source has it now."""
    page = _TABLE.sub(lambda found: found[1] + TABLES[found[2]](), page)
    return _SNIPPET.sub(lambda found: f"{found[1]}{snippet(found[2])}\n", page)


def snippet(name: str) -> str:
    """What a page shows of a file: the part between its lines `snippet` and `end`, else all of it."""
    text = (SNIPPETS / name).read_text()
    part = re.search(r"^ *// snippet\n(.*?)\n *// end$", text, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(part[1] if part else text).strip()


def settings() -> str:
    """Every setting, as its declaration has it."""
    return _table(("variable", "default", "meaning"), ((f"`{name}`", *rest) for name, *rest in reference()))


def outcomes() -> str:
    """Every status with its reasons."""
    notes = {
        "rejected": "no: the gateway's final answer",
        "unresolved": "yes",
        "invalid": "yes, with the original bytes",
    }
    assert {str(status) for status in DEAD_LETTERED} == {status for status, note in notes.items() if note[0] == "y"}
    rows = ((f"`{status}`", _code(reasons), notes.get(status, "no")) for status, reasons in REASONS.items())
    return _table(("status", "reasons", "dead-lettered"), rows)


def verdicts() -> str:
    """What the worker does about every answer, in the order in which it looks."""
    odd = Reply(500, f'{{"responseCode": "{SUCCESS.codes[0]}"}}'.encode())
    rows = [
        (f"{_code(SUCCESS.codes)}, HTTP 2xx", SUCCESS.means, _act(SUCCESS)),
        ("the same, any other HTTP status", "one of the two is wrong", _act(judge(odd))),
        *((answer, rule.means, _act(rule)) for answer, rule in _answers(RULES, "", "any other code")),
        *(
            (answer, rule.means, _act(rule))
            for answer, rule in _answers(BARE_RULES, "no code, HTTP ", "no code, any other")
        ),
        ("none, the call had been sent", "the effect is unknown", _act(judge(NoReply(True, "")))),
        ("none, it could not be sent", "nothing happened", _act(judge(NoReply(False, "")))),
    ]
    return _table(("answer", "it means", "the worker"), rows)


def alerts() -> str:
    """Every alert with what to do first, linked to its section of the same page, the runbook."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    rules.sort(key=lambda rule: ("page", "ticket", "info").index(rule["labels"]["severity"]))
    rows = (
        (
            f"[{rule['alert'].removeprefix('QrisExpire')}](#{rule['alert'].lower()})",
            rule["labels"]["severity"],
            rule["annotations"]["action"],
        )
        for rule in rules
    )
    return _table(("QrisExpire…", "severity", "first"), rows)


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "settings": settings,
    "outcomes": outcomes,
    "verdicts": verdicts,
    "alerts": alerts,
}


def _answers(rules: Sequence[Rule], form: str, rest: str) -> Iterator[tuple[str, Rule]]:
    """Which answers a row is about, given that those above it have not matched."""
    above: list[str] = []
    for rule in rules:
        other = "any other " if all(any(_within(one, code) for one in above) for code in rule.codes) else ""
        said = f", *{'* or *'.join(rule.phrases)}*" if rule.phrases else ""
        everything = set(rule.codes[0]) <= {"x", "*"}
        name = _code(rule.codes) + said if said else other + _code(rule.codes)
        yield rest if everything else form + name, rule
        above.extend(rule.codes)


def _within(code: str, pattern: str) -> bool:
    return len(code) == len(pattern) and all(
        wanted in ("x", digit) for digit, wanted in zip(code, pattern, strict=True)
    )


def _act(verdict: Rule | Verdict) -> str:
    if verdict.reason is not None:
        status = next(status for status, reasons in REASONS.items() if verdict.reason in reasons)
        return f"{ACTS[verdict.kind]} `{status}`, `{verdict.reason}`"
    return ACTS[verdict.kind] + ("; `effectUnknown`" if verdict.effect_unknown else "")


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> int:
    """Rewrites the pages; 1 if one had to be changed."""
    changed = False
    for page in PAGES:
        before = page.read_text()
        after = made(before)
        page.write_text(after)
        print(f"{page.relative_to(ROOT)}: {'as it was' if before == after else 'changed'}")
        changed |= before != after
    return int(changed)


if __name__ == "__main__":
    sys.exit(main())
