"""The one exception that users see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VgenError(ValueError):
    """Bad input: a file, config, prompt, shape or order. The message is one sentence: expected, found, what to do.

    The command line prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'raster'?)"`, or an empty string when nothing known is close to `name`."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
