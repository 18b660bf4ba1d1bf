"""What the benchmark makes of what it has measured."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmark import calls, pace, profile
from tests.benchmark.contenders import ASYNCHRONOUS, ROOT, WORKER, BenchmarkError, Contender
from tests.benchmark.measure import Latency, Mark, Run, Setup, within
from tests.benchmark.profile import REST, Sample, component, hundred, short
from tests.benchmark.tables import Table

ENGINE = ("worker/shells/amqp/engine.py", "Engine._run")
LINES = ("worker/shells/logs.py", "json_line")
ENCODER = ("json/encoder.py", "JSONEncoder.encode")


# -- profile --------------------------------------------------------------------------------------------------------


def test_a_sample_counts_for_the_innermost_file_that_is_known() -> None:
    """The standard library's functions count for whoever calls them, a library's for its component."""
    assert component([ENCODER, LINES, ENGINE]) == "log lines"
    assert component([("pika/spec.py", "Deliver.decode"), ENGINE]) == "AMQP connection, codec"
    assert component([ENCODER]) == REST


def test_of_several_beginnings_the_longest_wins() -> None:
    """Pika's loop is no codec."""
    assert component([("pika/adapters/select_connection.py", "poll")]) == "fibers and loop"


@pytest.mark.parametrize("start", [start for starts in profile.COMPONENTS.values() for start in starts])
def test_components_name_files_of_ours_that_exist(start: str) -> None:
    """A file that was renamed would count for its callers, and nobody would notice."""
    assert not start.startswith("worker/") or (ROOT / start).exists()


def test_files_are_named_from_their_package_on() -> None:
    """Wherever they are installed."""
    assert short(f"{ROOT}/worker/service.py") == "worker/service.py"
    assert short("/x/.venv/lib/python3.11/site-packages/pika/spec.py") == "pika/spec.py"
    assert short("/usr/lib/python3.12/json/encoder.py") == "json/encoder.py"


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20).filter(any))
def test_percentages_add_up(counts: list[int]) -> None:
    """To 100.0 as they are printed, each within a tenth of what it is."""
    shares = [count / sum(counts) for count in counts]

    printed = [float(text) for text in hundred(shares)]

    assert sum(printed) == pytest.approx(100)
    assert all(abs(text - share * 100) <= 0.1 + 1e-9 for text, share in zip(printed, shares, strict=True))


def test_the_sampler_is_read_and_components_add_up_with_the_other_threads() -> None:
    """A quarter of the loop's three samples, and a tenth of the time is no time of the loop."""
    text = """{"loop": 0.9, "stacks": [
        [[["/v/lib/python3.11/json/encoder.py", "encode"], ["%(root)s/worker/shells/logs.py", "json_line"]], 3],
        [[["<string>", "<lambda>"], ["%(root)s/worker/core/answer.py", "read"]], 1]]}"""

    sample = profile.parse(text % {"root": ROOT})
    rows = {row[0]: row[1:] for row in profile.component_table(sample, 200.0, 1).rows}

    assert rows["log lines"] == ["67.5", "135.0", "67.5"]
    assert rows["HTTP: reading the answer"] == ["22.5", "45.0", "22.5"]
    assert rows["other threads"] == ["10.0", "20.0", "0.0"]
    assert rows["all"] == ["100.0", "200.0", "90.0"]
    assert sum(float(row[0]) for name, row in rows.items() if name != "all") == pytest.approx(100)


def test_functions_count_once_in_each_stack() -> None:
    """Own time is that of the innermost one; a function that calls itself does not count twice."""
    sample = Sample(1.0, [((ENCODER, LINES, LINES, ENGINE), 3), ((LINES, ENGINE), 1)])

    rows = profile.function_table(sample, 100.0).rows

    assert rows == [
        ["json/encoder.py JSONEncoder.encode", "75.0", "75.0", "75.0"],
        ["shells/logs.py json_line", "25.0", "25.0", "100.0"],
    ]


# -- system calls ---------------------------------------------------------------------------------------------------


def test_what_perf_says_is_read() -> None:
    """The whole, what has a name, and its own clock."""
    text = """# started on Fri Nov 27 13:15:21 2026

 Performance counter stats for process id '7995':

             10263      raw_syscalls:sys_enter
              4237      syscalls:sys_enter_sendto
                 0      syscalls:sys_enter_poll

       2.004302705 seconds time elapsed
"""

    assert calls.read_perf(text, 9.0) == calls.Calls(2.004302705, 10263, {"sendto": 4237, "poll": 0})


def test_what_perf_may_not_count_is_no_count() -> None:
    """Then another tool has to."""
    assert calls.read_perf("   <not supported>      raw_syscalls:sys_enter\n", 1.0).whole == 0


def test_what_strace_says_is_read() -> None:
    """The column of errors may be empty."""
    text = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 52.99    0.453968         118      3835           poll
 39.37    0.337295          24     13501      2001 futex
------ ----------- ----------- --------- --------- ----------------
100.00    0.856724          34     17336      2001 total
"""

    assert calls.read_strace(text, 2.5) == calls.Calls(2.5, 17336, {"poll": 3835, "futex": 13501})


def test_calls_are_divided_by_the_commands_of_their_time() -> None:
    """Most first."""
    counted = pace.per_command(Setup(WORKER, 1), calls.Calls(2.0, 900, {"poll": 200, "sendto": 400}), 100.0)

    assert (counted.whole, counted.named) == (4.5, [("sendto", 2.0), ("poll", 1.0)])


# -- partial load ---------------------------------------------------------------------------------------------------


def rounds(contender: Contender, per_second: float, *costs: float, p50: float = 0.004) -> list[Run]:
    setup = Setup(contender, 1, per_second=per_second)
    one = Run(setup, 99.0, 0.0, 0.1, 0.5, 60.0, Latency(p50, 0.009), 0.001, 0, 0, 0.0, 0.5, 0.0)
    return [one._replace(cpu=cost) for cost in costs]


def runs(**worker: float) -> Sequence[Sequence[Run]]:
    return [
        rounds(WORKER, 0.0, 0.2, 0.4),
        rounds(WORKER, 100.0, 0.3, 0.6, **worker),
        rounds(ASYNCHRONOUS, 100.0, 0.6, 1.2),
        rounds(ASYNCHRONOUS, 0.0, 0.4, 0.4),
    ]


def test_a_load_is_compared_with_its_neighbours() -> None:
    """Within each round, with full load and with the other; the machine was half as fast in the second one."""
    counted = [pace.Counted(Setup(WORKER, 1, per_second=100.0), 12.34, [], 100.0)]

    table = pace.cost_table(runs(), counted)

    cells = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    assert [(one["load per s"], one["to full"], one["ratio"]) for one in cells] == [
        ("100", "1.50", "0.50"),
        ("full", "1.00", "0.75"),
        ("100", "2.25", "1.00"),
        ("full", "1.00", "1.00"),
    ]
    assert [one["system calls"] for one in cells] == ["12.3", *["not counted"] * 3]
    assert (cells[0]["CPU ms"], cells[0]["user"], cells[0]["system"]) == ("0.450", "0.350", "0.100")


def test_a_load_that_was_too_much_is_said() -> None:
    """Its commands queue up, as under full load."""
    assert pace.cost_table(runs(), []).notes[0].startswith("Commands come")
    assert pace.cost_table(runs(p50=0.5), []).notes[0].startswith("NOT A PARTIAL LOAD: worker at 100")


def test_calls_that_were_not_counted_are_missed_loudly() -> None:
    """In the title, since there are no rows."""
    assert "NOT COUNTED" in pace.calls_table([], None).text()


def test_a_run_is_watched_between_a_tenth_and_nine_tenths() -> None:
    """And whoever watches hears of both."""
    marks = [Mark(float(at), done, 0.0) for at, done in enumerate((0, 5, 20, 50, 95, 100))]
    heard: list[str] = []

    assert within(marks, 100, lambda: heard.append("begin"), lambda: heard.append("end")) == (marks[2], marks[4])
    assert heard == ["begin", "end"]


def test_a_run_that_is_over_at_once_cannot_be_watched() -> None:
    """It says what to do."""
    with pytest.raises(BenchmarkError, match="ask for more"):
        within([Mark(0.0, 0, 0.0), Mark(1.0, 100, 0.0)], 100, lambda: None, lambda: None)


def test_a_table_brings_along_what_was_made_of_the_same_runs() -> None:
    """Below it, in both forms."""
    one = Table("One", ("a",), [["1"]])
    both = replace(one, also=[replace(one, title="Two")])

    assert both.text() == f"{one.text()}\n\n{both.also[0].text()}"
    assert both.markdown() == f"{one.markdown()}\n\n{both.also[0].markdown()}"
