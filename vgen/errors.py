"""The one exception that users see, and what any exception is in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VgenError(ValueError):
    """Bad input: a file, config, prompt, shape or order. The message is one sentence: expected, found, what to do.

    The command line prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'raster'?)"`, or an empty string when nothing known is spelt like `name`, upper case or not.

    0.75: one wrong letter in four. With difflib's own 0.6 'quantum' is 'atm'.
    """
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold(), candidate)
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.75)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, without its full stop; its type when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def file_reason(error: OSError) -> str:
    """'outputs/a.png: Permission denied' of an operating system's error."""
    name = error.filename2 or error.filename  # of a rename: where the file was to go
    reason = error.strerror or first_line(error)
    return f"{name}: {reason}" if name else reason


def in_words(error: Exception) -> tuple[int, str]:
    """Exit code and one line for any exception, the last net of the command line.

    2 what the user gave, or a file that the system refuses; 1 memory that is not there, or a fault of vgen.
    """
    if isinstance(error, VgenError):
        code, words = 2, str(error)
    elif isinstance(error, MemoryError) or _wants_memory(error):
        advice = "give a smaller --batch-size (train: batch_size), a smaller picture or model, or --dtype bfloat16"
        code, words = 1, f"there is not enough memory ({first_line(error)}); {advice}"
    elif isinstance(error, OSError):
        code, words = 2, f"{file_reason(error)}; check the path, its permissions and the space on the disk"
    elif _wants_space(error):
        code, words = 2, f"a file could not be written whole ({first_line(error)}); check the space on the disk"
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("vgen"):
        code, words = (
            2,
            f"the Python module {error.name} is missing; install vgen again (pip brings what it needs), or the package with that module",
        )
    else:
        kind = type(error).__name__
        said = "" if str(error).strip() in ("", kind) else f": {first_line(error)}"
        code, words = 1, f"this is a fault of vgen ({kind}{said}); run it again with --debug and report what it prints"
    return code, " ".join(words.split())


def _wants_memory(error: Exception) -> bool:
    """torch's errors: on a GPU a type of its own, on the CPU a RuntimeError with these words."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))
    )


def _wants_space(error: Exception) -> bool:
    """A full disk, as safetensors (os error 28) and torch's zip writer tell it."""
    return "os error 28" in str(error) or "PytorchStreamWriter failed" in str(error)
