"""What data is, as a digest: the bytes of its pictures in their order. Never a path, a size or a time, which lie."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tqdm import tqdm

from vgen.data.images import BadFile
from vgen.data.sources import Source


def digest(*values: Any) -> str:
    """SHA-256, as hex digits, of values that JSON can write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def pictures_digest(source: Source, name: str) -> str:
    """The digest of all pictures of a source, as their files are. name: what the progress bar of a long reading is called."""
    whole = hashlib.sha256()
    for index in tqdm(range(len(source.keys)), desc=f"{name}: comparing", unit="image", delay=2, leave=False):
        whole.update(_picture_digest(source, index))
    return whole.hexdigest()


def _picture_digest(source: Source, index: int) -> bytes:
    try:
        return hashlib.sha256(source.image(index)).digest()
    except (BadFile, OSError):
        return bytes(hashlib.sha256().digest_size)  # no file has this digest; one that becomes readable gets its own
