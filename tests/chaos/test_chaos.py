"""The promise under a seeded run of faults: ``pytest --chaos``, or ``python -m tests.chaos`` to watch it."""

import pytest

from tests.chaos.monkey import run


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_is_lost_whatever_is_killed(seed: int) -> None:
    """20,000 commands each end in an outcome while workers, broker and gateway are killed and restarted."""
    story = run(seed, 20_000)
    print(story.text())

    assert set(story.statuses) <= {"expired", "unresolved"}
