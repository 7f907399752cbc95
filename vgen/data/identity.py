"""What data is, as a digest: the bytes of its pictures in their order. Never a path, a size or a time, which lie."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vgen.data.images import BadFile
from vgen.data.samples import Readable
from vgen.data.sources import Source
from vgen.files import sha256
from vgen.saved import weight_files


def digest(*values: Any) -> str:
    """SHA-256, as hex digits, of values that JSON can write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def pictures_digest(source: Source, name: str) -> str:
    """The digest of all pictures of a source, as their files are. name: what the progress bar of a long reading is called."""
    whole = hashlib.sha256()
    for sample in tqdm(source.samples, desc=f"{name}: comparing", unit="image", delay=2, leave=False, disable=None):
        files = [_file_digest(picture) for picture in sample.pictures]
        whole.update(digest(files).encode())
    return whole.hexdigest()


def weights_digest(folder: str | Path) -> str:
    """The digest of the weights of a saved model: of their file, or of the digests of several."""
    files, _ = weight_files(folder)
    digests = [sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else digest(digests)


def _file_digest(file: Readable) -> str:
    try:
        return hashlib.sha256(file.read()).hexdigest()
    except (BadFile, OSError):
        return ""  # no file has this digest; one that becomes readable gets its own
