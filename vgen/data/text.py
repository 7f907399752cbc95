"""Text as files hold it: encodings, JSON values, captions. No torch here, so that wrong data is refused before it is imported."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping
from typing import Any

# Where a record (the JSON of a sample, a row of a table) may keep its caption: the first that holds words wins.
CAPTION_FIELDS = ("caption", "text", "captions", "prompt")
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class BadFile(ValueError):
    """A sample that cannot be read; datasets skip it and count it. The message says what is wrong with such files."""


def read_text(contents: bytes) -> str:
    """UTF-8, or what a byte-order mark says, without the mark. Raises BadFile."""
    encoding = next((name for mark, name in _MARKS.items() if contents.startswith(mark)), "utf-8")
    try:
        return contents.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadFile("text that is not UTF-8") from error


def read_json(contents: bytes) -> Any:
    """The value of a JSON text in any Unicode encoding. Raises BadFile."""
    try:
        return json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"JSON that cannot be read ({error})") from error


def read_record(contents: bytes) -> dict[str, Any]:
    """A JSON object. Raises BadFile."""
    try:
        value = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise BadFile("JSON that cannot be read") from error
    if not isinstance(value, dict):
        raise BadFile("JSON that is no object")
    return value


def whole_text(text: str) -> str:
    """Text that every encoding can write: halves of a surrogate pair (JSON may hold them, file names too) become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def caption_of(value: object) -> str:
    """The caption that a JSON value or a table cell means: of a list the first that is not empty; "" of null and of what is no text."""
    if isinstance(value, list):
        return next(filter(None, map(caption_of, value)), "")
    if isinstance(value, str):
        return whole_text(value).strip()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else ""


def caption_in(record: Mapping[str, Any]) -> str:
    """The caption of a record: the first of CAPTION_FIELDS that holds words, else ""."""
    return next(filter(None, (caption_of(record.get(name)) for name in CAPTION_FIELDS)), "")


def aesthetic_in(record: Mapping[str, Any]) -> float:
    """How much people like the picture, about 1 to 10; NaN: not known."""
    try:
        return float(record.get("aesthetic_score", math.nan))
    except (TypeError, ValueError, OverflowError):
        return math.nan
