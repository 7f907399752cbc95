"""Samples of image folders.

Class: the first subfolder. Caption: what the tables say (`vgen.data.tables`) where they name any picture of the split; else the
sidecar `NAME.txt`, else `NAME.caption`, else `NAME.json` (its field caption or text). Aesthetic score: `aesthetic_score` of `NAME.json`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from vgen.data.samples import File, Sample, Tally
from vgen.data.splits import Layout
from vgen.data.tables import Table, read_tables, tidy
from vgen.data.text import BadFile, aesthetic_in, caption_in, read_record, read_text, whole_text
from vgen.data.tree import OTHER_PICTURES, files_below, is_picture
from vgen.errors import VgenError

TEXTS = (".txt", ".caption")  # the second: what the taggers of fine-tuning tools write


def read_folders(where: Layout) -> tuple[dict[str, list[Sample]], dict[str, Tally], list[str]]:
    """Split -> samples in the order of their paths, and what was met; sentences about the whole. Raises VgenError for bad tables."""
    tallies = {split: Tally() for split in where.parts}
    trouble = {split: Counter() for split in where.parts}
    folders = {split: folder for split, (folder,) in where.parts.items()}
    names = {split: list(files_below(folder, trouble[split])) for split, folder in folders.items()}
    everything = [name for split in names for name in _from_root(where.root, folders[split], names[split])]
    notes = []
    if where.divided:
        beside = [path.name for path in where.root.iterdir() if path.is_file() and not path.name.startswith(".")]
        everything += beside
        loose = sum(map(is_picture, beside))
        notes += [f"pictures beside the split folders are not read: {loose}"] if loose else []
    tables, more = read_tables(where.root, everything)
    pictures = [tidy(name) for name in everything if is_picture(name)]
    for table in tables:
        named = table.names(pictures)
        if table.captions and not named:
            example = f": expected paths from there, like {_seen_from(table, pictures[0])}" if pictures else ""
            raise VgenError(f"{where.root / table.name} names no picture of its folder{example}")
        if len(named) < len(table.captions):
            more.append(f"{table.name} names {len(table.captions) - len(named)} pictures that are not there")
    samples = {
        split: _samples(where, folder, names[split], tables, tallies[split]) for split, folder in folders.items()
    }
    for split, tally in tallies.items():
        tally.notes += [f"{text}: {count}" for text, count in trouble[split].items()]
    return samples, tallies, [*notes, *more, *_repeated(tables)]


def _samples(where: Layout, folder: Path, names: Sequence[str], tables: Sequence[Table], tally: Tally) -> list[Sample]:
    pictures = sorted(filter(is_picture, names), key=lambda name: name.split("/"))
    tally.found = len(pictures)
    others = Counter(PurePosixPath(name).suffix.lower() for name in names)
    tally.notes += [f"{others[suffix]} {suffix} not read: convert them" for suffix in OTHER_PICTURES if others[suffix]]
    parts = {name.removesuffix("_stats.json") for name in names if name.endswith("_stats.json")}
    parts &= {name.split("/")[0] for name in pictures}
    if parts:
        tally.notes.append(f"{len(parts)} folders of img2dataset, such as {min(parts)}/, are no classes")
    from_root = dict(zip(pictures, map(tidy, _from_root(where.root, folder, pictures))))
    used = [table for table in tables if table.names(from_root.values())]
    sidecars = {_lower_suffix(name): name for name in names if name.lower().endswith((*TEXTS, ".json"))}
    stems = Counter(_stem(name) for name in pictures)
    texts = sum(f"{stem}{suffix}" in sidecars for stem in stems for suffix in TEXTS)
    if used and texts:
        tally.notes.append(f"{texts} caption files beside the pictures are not read: {used[0].name} has the captions")
    samples = []
    # A bar for those who wait: a million sidecars on a slow disk take minutes.
    for name in tqdm(pictures, desc="reading captions", unit="picture", delay=2, leave=False, disable=None):
        stem = _stem(name)
        try:
            record = _record(folder, sidecars.get(f"{stem}.json"))
            caption, source = _caption(from_root[name], used) if used else _sidecar(folder, stem, sidecars, record)
        except (BadFile, OSError) as error:
            tally.skip(str(error) if isinstance(error, BadFile) else "sidecar that cannot be read", name)
            continue
        if caption:
            tally.captions_from[source] += 1
        first, _, below = name.partition("/")
        samples.append(
            Sample(
                key=whole_text(name if stems[stem] > 1 else stem),
                pictures=(File(folder / name),),
                caption=caption,
                label=whole_text(first) if below and first not in parts else None,
                aesthetic=aesthetic_in(record),
            )
        )
    tally.notes += [
        f"the captions of {table.name} are not used: {used[0].name} has some for the same pictures"
        for table in used
        if not tally.captions_from[table.name] and any(map(table.caption, from_root.values()))
    ]
    return samples


def _caption(name: str, tables: Sequence[Table]) -> tuple[str, str]:
    """The caption of a picture and the table it is from: the first that has words for it."""
    return next(((caption, table.name) for table in tables if (caption := table.caption(name))), ("", ""))


def _sidecar(folder: Path, stem: str, sidecars: Mapping[str, str], record: Mapping) -> tuple[str, str]:
    for suffix in TEXTS:
        text = sidecars.get(f"{stem}{suffix}")
        if text and (caption := whole_text(read_text((folder / text).read_bytes())).strip()):
            return caption, f"{suffix} files"
    return caption_in(record), ".json files"


def _record(folder: Path, name: str | None) -> dict:
    return read_record((folder / name).read_bytes()) if name else {}


def _from_root(root: Path, folder: Path, names: Sequence[str]) -> list[str]:
    """Paths from the root of the data instead of from the folder of a split."""
    prefix = "" if folder == root else f"{folder.name}/"
    return [prefix + name for name in names]


def _seen_from(table: Table, picture: str) -> str:
    folder = table.name.rpartition("/")[0]
    return picture.removeprefix(f"{folder}/") if folder else picture


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


def _lower_suffix(name: str) -> str:
    return _stem(name) + PurePosixPath(name).suffix.lower()


def _repeated(tables: Sequence[Table]) -> list[str]:
    return [
        f"{table.name} has several rows for a picture ({table.repeated} more than pictures): the first is used"
        for table in tables
        if table.repeated
    ]
