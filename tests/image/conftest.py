"""The image, built once for all tests that run it."""

from collections.abc import Iterator

import pytest

from tests.image.containers import Unavailable, build, find_base, find_tools, succeeds

TAG = "localhost/qris-expire-worker:test"


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """Built once; skipped, loudly, where there is nothing to build it with."""
    try:
        find_tools()
        find_base()
    except Unavailable as reason:
        pytest.skip(f"IMAGE NOT TESTED: {reason}")
    build(TAG, "--build-arg", "REVISION=abc123", "--build-arg", "SOURCE=https://git.example/qris-expire")
    yield TAG
    succeeds("podman", "rmi", "--force", TAG)
