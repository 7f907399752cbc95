"""Samples of WebDataset shards, in the order of file names and then of the file.

Picture: `KEY.png`, `KEY.jpg`…; of several the first that can be read. Caption: member `.txt`, else caption or text of `.json`. Label:
member `.cls`, else `label` of `.json`. Aesthetic score: `aesthetic_score` of `.json`. A key ends at the first dot of the base name, as
in WebDataset: `a.left.png` is the member `left.png` of `a`, and its picture where `a` has no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from vgen.data.labels import BadLabel, Label, read_label
from vgen.data.samples import Sample, Tally
from vgen.data.shards import ShardSample, read_index
from vgen.data.text import BadFile, aesthetic_in, caption_in, read_record, read_text, whole_text
from vgen.data.tree import is_picture


def read_shards(shards: Sequence[Path]) -> tuple[list[Sample], Tally]:
    """The samples of one split's shards, and what was met. Raises VgenError for a broken shard."""
    tally = Tally()
    # A bar for those who wait: big data on a slow disk takes minutes.
    indexed = {
        shard: read_index(shard)
        for shard in tqdm(shards, desc="indexing", unit="shard", delay=2, leave=False, disable=None)
    }
    keys = Counter(sample.key for samples in indexed.values() for sample in samples)
    result = []
    for shard, samples in indexed.items():
        with open(shard, "rb") as file:
            for sample in samples:
                # Writers that count from 0 in every shard: the shard tells its samples from the others'.
                key = sample.key if keys[sample.key] == 1 else f"{shard.stem}/{sample.key}"
                try:
                    result.append(_read(key, sample, file, tally))
                except BadFile as error:
                    tally.skip(str(error), key)
    tally.found = sum(map(len, indexed.values()))
    repeated = sum(sample.repeated for samples in indexed.values() for sample in samples)
    if repeated:
        tally.notes.append(f"members given twice in a shard: {repeated}, of which the last counts, as in extracting")
    return result, tally


def _read(key: str, sample: ShardSample, file, tally: Tally) -> Sample:
    members = sample.members
    pictures = [extension for extension in members if is_picture(f".{extension}")]
    plain = [extension for extension in pictures if "." not in extension]
    prefix = ""
    if not plain and pictures:
        prefix = pictures[0].rpartition(".")[0] + "."
        if any(extension.rpartition(".")[0] + "." != prefix for extension in pictures):
            raise BadFile("several pictures under one key, which ends at the first dot")
    if not pictures:
        raise BadFile("no picture")

    def contents(extension: str) -> bytes | None:
        span = members.get(prefix + extension, members.get(extension))
        return None if span is None else span.read_from(file)

    text, record = contents("txt"), contents("json")
    record = {} if record is None else read_record(record)
    caption = "" if text is None else whole_text(read_text(text)).strip()
    source = ".txt members" if caption else ".json members"
    caption = caption or caption_in(record)
    if caption:
        tally.captions_from[source] += 1
    label = _label(key, contents("cls"), record, tally)
    return Sample(key, tuple(members[name] for name in plain or pictures), caption, label, aesthetic_in(record))


def _label(key: str, cls: bytes | None, record: dict, tally: Tally) -> Label:
    try:
        return read_label(record.get("label") if cls is None else read_text(cls))
    except BadLabel as error:
        tally.unlabel(str(error), key)
    except BadFile as error:
        tally.unlabel(f"labels in {error}", key)
    return None
