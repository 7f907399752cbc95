"""The emoji dataset: Microsoft's Fluent 3D pictures with captions and classes, as WebDataset shards.

Pictures: npm package `@lobehub/fluent-emoji-3d` (`assets/<code points>.webp`, 256 px with alpha). Names, categories and
subcategories: `emoji.json` of npm package `emoji-datasource-google`; its skin-tone variants are left out. Both are joined on the code points.

    OUT/train-00000.tar …  OUT/heldout-00000.tar …     KEY.png, KEY.json (caption, label, subcategory, category, name, codepoint), KEY.txt, KEY.cls
    OUT/manifest.json                                  settings, counts, classes, licences, SHA-256 of sources and shards
    OUT/archives/                                      the npm archives, unless they came from --archives; may be deleted

KEY is the file name of the picture ("1f600"); label is the index of the subcategory in the manifest's `classes`. Which pictures are held
out depends only on a hash of the code points, so the split survives new emoji, other sizes and other shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL
from PIL import Image
from tqdm import tqdm

from vgen.data.emoji_captions import captions_of
from vgen.data.npm import Package, fetch_archive, find_archive, read_members
from vgen.data.shards import write_shard
from vgen.errors import VgenError
from vgen.files import sha256, write_json
from vgen.layers.pictures import open_picture

# Increase when captions, split, file layout or image processing change: older outputs are then built anew.
FORMAT = 1
HELDOUT_PERCENT = 10
_SHARD = re.compile(r"(train|heldout)-\d{5}\.tar")
PICTURES = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
NAMES = Package("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
LICENCES = {
    "pictures": "MIT: Fluent Emoji, Copyright (c) Microsoft Corporation; packaged by LobeHub (MIT)",
    "names": "MIT: emoji-data, Copyright (c) 2013 Cal Henderson (only emoji.json is used, none of its pictures)",
}


@dataclass(frozen=True)
class Emoji:
    """One picture-name pair. `key` is the name of the picture's file, in lower case."""

    key: str
    codepoint: str
    name: str
    caption: str
    subcategory: str
    category: str


def build_emoji(
    out: str | Path,
    *,
    size: int = 64,
    shard_size: int = 1000,
    archives: str | Path | None = None,
    packages: tuple[Package, Package] = (PICTURES, NAMES),
    progress: bool = True,
) -> dict:
    """Builds (or completes, or just checks) the dataset in `out`; returns its manifest.

    Args:
        out: folder of the dataset, made when needed.
        size: side of the stored PNGs in pixels, 8 to 256.
        shard_size: pictures per shard.
        archives: folder that holds both npm archives; None fetches them with `npm pack` into `out`/archives.
        packages: the picture and the name package (other versions, tests).
        progress: show a progress bar.

    Finished shards are never made again: a killed build continues behind the last one, and a complete dataset is only verified.
    Raises VgenError for bad sizes, missing npm, missing or broken archives.
    """
    if not 8 <= size <= 256:
        raise VgenError(f"--size must be 8 to 256 pixels (the pictures have 256), found {size}")
    if shard_size < 1:
        raise VgenError(f"--shard-size must be at least 1, found {shard_size}")
    out = Path(out)
    settings = {
        "kind": "emoji",
        "format": FORMAT,
        "image_size": size,
        "shard_size": shard_size,
        "packages": [package.spec for package in packages],
    }
    ours = _files_of_ours(out)
    earlier = _read_manifest(out, settings)
    done = {file: entry for file, entry in earlier.get("shards", {}).items() if _intact(out / file, entry["sha256"])}
    if earlier.get("complete") and len(done) == len(earlier["shards"]):
        return earlier

    pictures, names = (
        find_archive(package, archives) if archives else fetch_archive(package, out / "archives")
        for package in packages
    )
    sources = [
        {**asdict(package), "file": path.name, "digest": sha256(path)}
        for package, path in zip(packages, (pictures, names))
    ]
    if sources != earlier.get("sources"):
        done = {}
    emoji, unmatched = _join(_read_names(names), webps := _read_pictures(pictures))
    classes = sorted({item.subcategory for item in emoji})
    plan = _plan(emoji, shard_size)
    heldout = sum(len(items) for file, items in plan.items() if file.startswith("heldout"))
    manifest = {
        **settings,
        "complete": False,
        "counts": {
            "pictures": len(emoji),
            "train": len(emoji) - heldout,
            "heldout": heldout,
            "names": len({item.name for item in emoji}),
            "captions": len({item.caption for item in emoji}),
            "classes": len(classes),
            **unmatched,
        },
        "licences": LICENCES,
        "sources": sources,
        "made_with": {"pillow": PIL.__version__},
        "classes": classes,
        "shards": done,
        "files": sorted(ours | plan.keys()),  # what this build may write or remove, and has perhaps begun
    }
    write_json(out / "manifest.json", manifest)  # before any shard: readers refuse a folder that is not complete
    with tqdm(total=len(emoji), desc="emoji", unit="picture", disable=not progress) as bar:
        for file, items in plan.items():
            if file in done:
                bar.update(len(items))
                continue
            write_shard(out / file, _samples(items, webps, classes, size, bar))
            done[file] = {"samples": len(items), "sha256": sha256(out / file)}
            write_json(out / "manifest.json", manifest)
    for stale in ours - plan.keys():
        (out / stale).unlink(missing_ok=True)
    del manifest["files"]
    manifest.update(complete=True, shards={file: done[file] for file in plan})
    write_json(out / "manifest.json", manifest)
    return manifest


def held_out(codepoint: str) -> bool:
    """Whether a picture belongs to the held-out split: a pure function of its code points."""
    return int.from_bytes(_hash(codepoint)[:4], "big") % 100 < HELDOUT_PERCENT


def _join(names: list[dict], pictures: dict[str, bytes]) -> tuple[list[Emoji], dict[str, int]]:
    """Pairs names with pictures; also counts what found no partner.

    Most files are named by the exact code points. Where they are not, the difference is the presentation selector FE0F,
    which some files lack and some carry twice.
    """
    relaxed: dict[str, str] = {}
    for key in sorted(pictures):
        relaxed.setdefault(_without_selector(key), key)
    entries, keys = [], []
    for entry in names:
        exact = entry["unified"].lower()
        key = exact if exact in pictures else relaxed.get(_without_selector(exact))
        if key is not None:
            entries.append(entry)
            keys.append(key)
    if not entries:
        raise VgenError(
            "no picture of the picture package bears a code point of the name package: are the versions right?"
        )
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise VgenError(
            f"{len(repeated)} pictures have more than one name, such as {repeated[0]}: are the versions right?"
        )
    emoji = [
        Emoji(key, entry["unified"], entry["name"], caption, entry["subcategory"], entry["category"])
        for key, entry, caption in zip(keys, entries, captions_of(entries))
    ]
    unmatched = {
        "names_without_picture": len(names) - len(emoji),
        "pictures_without_name": len(pictures) - len(emoji),  # skin tones and files under a second name
    }
    return emoji, unmatched


def _plan(emoji: list[Emoji], shard_size: int) -> dict[str, list[Emoji]]:
    """Shard file -> its pictures. In hash order, so that a reader that only streams sees mixed classes."""
    emoji = sorted(emoji, key=lambda item: _hash(item.codepoint)[4:])
    plan = {}
    for split, wanted in (("train", False), ("heldout", True)):
        items = [item for item in emoji if held_out(item.codepoint) == wanted]
        for number, start in enumerate(range(0, len(items), shard_size)):
            plan[f"{split}-{number:05d}.tar"] = items[start : start + shard_size]
    return plan


def _samples(items: list[Emoji], webps: dict[str, bytes], classes: list[str], size: int, bar: tqdm) -> Iterator:
    for item in items:
        label = classes.index(item.subcategory)
        record = {**asdict(item), "label": label}
        yield (
            item.key,
            {
                "png": _png(webps[item.key], item.key, size),
                "json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode(),
                "txt": item.caption.encode(),
                "cls": str(label).encode(),
            },
        )
        bar.update()


def _png(webp: bytes, key: str, size: int) -> bytes:
    # White first, then resize: averaging colours across transparent pixels would leave dark fringes.
    page = open_picture(webp, f"picture {key}.webp of the archive")
    buffer = io.BytesIO()
    page.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _read_pictures(archive: Path) -> dict[str, bytes]:
    """Code points in lower case -> webp file."""
    return {Path(name).stem.lower(): contents for name, contents in read_members(archive, ".webp")}


def _read_names(archive: Path) -> list[dict]:
    for name, contents in read_members(archive, "emoji.json"):
        if name == "emoji.json":
            return json.loads(contents)
    raise VgenError(f"{archive} holds no emoji.json: expected a version of emoji-datasource-google")


def _read_manifest(out: Path, settings: dict) -> dict:
    """The manifest of an earlier run with the same settings, else {}."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        same = all(manifest[name] == value for name, value in settings.items())
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return manifest if same else {}


def _files_of_ours(out: Path) -> set[str]:
    """The shards that earlier builds, with whatever settings, wrote or planned in `out`. Raises VgenError where other data lies.

    Nothing else in `out` is ever written over or removed, and shards of others would be read as part of the dataset.
    """
    path = out / "manifest.json"
    if out.exists() and not out.is_dir():
        raise VgenError(f"--out {out} is a file, expected a folder")
    ours: set[str] = set()
    if path.exists():
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["kind"] != "emoji":
                raise ValueError(manifest["kind"])
            ours = {*manifest["shards"], *manifest.get("files", ())}
            unlisted = not manifest["complete"] and "files" not in manifest  # begun before `files` was written
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VgenError(
                f"{path} is not the manifest of an emoji dataset; nothing was changed: choose another --out"
            ) from error
        if unlisted:
            ours |= {file.name for file in out.glob("*.tar")}
    ours = {name for name in ours if _SHARD.fullmatch(name)}
    if foreign := sorted({file.name for file in out.glob("*.tar")} - ours):
        raise VgenError(
            f"{out / foreign[0]} is there already and belongs to no emoji dataset of vgen; nothing was changed: choose another "
            "--out, or move it away"
        )
    return ours


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _without_selector(codepoints: str) -> str:
    return "-".join(point for point in codepoints.lower().split("-") if point != "fe0f")


def _hash(codepoint: str) -> bytes:
    return hashlib.sha256(codepoint.upper().encode()).digest()
