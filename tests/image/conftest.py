"""The image, built once for all tests that run it."""

from collections.abc import Iterator

import pytest

from tests.conftest import in_ci
from tests.image.containers import COMPLETED, Unavailable, build, find_base, find_tools, may_install, succeeds

TAG = "localhost/qris-expire-worker:test"


@pytest.fixture(scope="session")
def base() -> Iterator[str]:
    """The base image; skipped, loudly, where nothing can build it. CI fails where it might install the tools."""
    try:
        find_tools()
    except Unavailable as reason:
        give_up = pytest.fail if in_ci() and may_install() else pytest.skip
        give_up(f"IMAGE NOT TESTED: {reason}")
    try:
        yield find_base()
    except Unavailable as reason:
        pytest.skip(f"IMAGE NOT TESTED: {reason}")
    succeeds("podman", "rmi", "--force", COMPLETED)


@pytest.fixture(scope="session")
def image(base: str) -> Iterator[str]:
    """Ours."""
    build(TAG, base, "--build-arg", "REVISION=abc123", "--build-arg", "SOURCE=https://git.example/qris-expire")
    yield TAG
    succeeds("podman", "rmi", "--force", TAG)
