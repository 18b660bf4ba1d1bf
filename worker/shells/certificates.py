"""When the configured certificates end, so that somebody is told before they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509

LOOK_EVERY: Final = 60.0  # seconds; a file that is replaced is seen within so long

log = structlog.get_logger()


class Expiries:
    """Looks at the files now and then. ``files``: the catalogue's names of certificates, and their PEM files if set.
    ``on_end``: told each name and the unix time at which that certificate ends, None without a file."""

    def __init__(self, files: Mapping[str, Path | None], on_end: Callable[[str, float | None], None]) -> None:
        self._files = files
        self._on_end = on_end
        self._look_at = 0.0

    def look(self) -> None:
        """To be called again and again; it knows how often to look."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_EVERY
        for name, path in self._files.items():
            try:
                self._on_end(name, None if path is None else first_end(path))
            except (OSError, ValueError) as error:
                # Whoever needs the file says more; what was known of the one before stays.
                log.warning("certificate.unreadable", certificate=name, file=str(path), reason=str(error))


def first_end(path: Path) -> float:
    """The unix time at which the first certificate of a PEM file ends. Raises `OSError`, and `ValueError` for a file
    without any."""
    certificates = x509.load_pem_x509_certificates(path.read_bytes())
    return min(each.not_valid_after_utc.timestamp() for each in certificates)
