"""WebDataset shards: writing them reproducibly, and random access to their samples.

A shard is an uncompressed tar file; the members `KEY.png`, `KEY.json`, `KEY.txt`, `KEY.cls` (anything up to the first dot of the
base name) belong to the sample KEY. The usual reader streams shards and shuffles in a buffer, so its order can be neither
exact nor resumed. Here each shard is scanned once for the offsets of its members, and every read is one seek.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vgen.data.text import whole_text
from vgen.data.tree import JUNK
from vgen.errors import VgenError
from vgen.files import atomic_path


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of one member inside a shard."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        # A handle per read keeps items picklable for DataLoader workers; the system caches the pages.
        with open(self.shard, "rb") as file:
            return self.read_from(file)

    def read_from(self, file: BinaryIO) -> bytes:
        """The same, from the opened shard."""
        file.seek(self.offset)
        return file.read(self.size)


@dataclass(frozen=True)
class ShardSample:
    """One sample: its key, its members by extension (lower case, without the first dot), and how many were given again."""

    key: str
    members: dict[str, Span]
    repeated: int = 0


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Writes (key, {extension: bytes}) samples; the same samples give the same file, byte for byte (fixed owner, mode, times)."""
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, members in samples:
            for extension, contents in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(contents)
                info.mode = 0o644
                archive.addfile(info, io.BytesIO(contents))


def read_index(shard: Path) -> list[ShardSample]:
    """All samples of a shard, in file order. Of a member that is given twice the last counts, as where a tar is extracted.

    Raises VgenError when the file is not an intact tar.
    """
    samples: dict[str, dict[str, Span]] = {}
    repeated: Counter[str] = Counter()
    spans: dict[str, Span] = {}  # by the name of the member, for hard links
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if member.isfile() and not member.issparse():
                    spans[member.name] = Span(shard, member.offset_data, member.size)
                elif member.islnk() and member.linkname in spans:  # GNU tar writes a file's second name so
                    spans[member.name] = spans[member.linkname]
                else:
                    continue
                if not (stem and dot) or JUNK & set(folder.split("/")):
                    continue
                key = whole_text(f"{folder}/{stem}" if folder else stem)
                members = samples.setdefault(key, {})
                repeated[key] += extension.lower() in members
                members[extension.lower()] = spans[member.name]
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, tarfile.TarError) and _starts_with(shard, b"\x1f\x8b"):
            raise VgenError(f"{shard} is compressed (gzip), and shards are read at any place: unpack it") from error
        raise VgenError(f"{shard} is not an intact tar shard ({error}): build or download it again") from error
    end = max((span.offset + span.size for members in samples.values() for span in members.values()), default=0)
    # tarfile takes a file that was cut between two members for a whole one: only the zero block behind the last member is missing.
    if samples and shard.stat().st_size < -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE:
        raise VgenError(f"{shard} is not an intact tar shard (its end is missing): build or download it again")
    return [ShardSample(key, members, repeated[key]) for key, members in samples.items()]


def _starts_with(file: Path, mark: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark
