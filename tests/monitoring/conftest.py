"""The programs that these tests run."""

import pytest

from tests.conftest import in_ci
from tests.monitoring import programs


@pytest.fixture(scope="session")
def tools() -> None:
    """promtool, prometheus, alertmanager and amtool are installed: now, if they were not and we may.

    Where we may not (no root, no apt) the tests are skipped, loudly; where we may and it fails, CI fails.
    """
    if not programs.missing():
        return
    try:
        programs.install()
    except programs.Unavailable as reason:
        give_up = pytest.fail if in_ci() and programs.may_install() else pytest.skip
        give_up(str(reason))
