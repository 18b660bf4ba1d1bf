"""JSON as the worker writes it most: compact, and in ASCII, so that it passes through anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import orjson

_OPTIONS: Final = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_DELETE: Final = b"\x7f"
_SEPARATORS: Final = (",", ":")


def compact(value: object, default: Callable[[Any], object] | None = None) -> bytes:
    """``value`` as JSON. ``default`` gives something else for what JSON has no form for.

    orjson writes it in a tenth of json's time, but in UTF-8 and with DEL as it is; and it refuses wide integers and
    halves of surrogates. Such values json writes. Raises TypeError, ValueError or RecursionError for what
    neither can write.
    """
    try:
        data = orjson.dumps(value, default, _OPTIONS)
    except TypeError:
        data = b"\xff"
    if data.isascii() and _DELETE not in data:
        return data
    return json.dumps(value, separators=_SEPARATORS, default=default, allow_nan=False).encode("ascii")
