"""What a dataset holds, in words and as a contact sheet."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as F

from vgen.data.dataset import ImageDataset
from vgen.data.sources import open_data
from vgen.data.splits import find_split, layout
from vgen.data.tokens import TokenDataset
from vgen.layers.picture_files import save_picture


def describe(path: str | Path, split: str | None = None, examples: int = 8, held_out: str | int | None = None) -> str:
    """Lines of text: what was found, used and skipped in every split; then classes and captions of one, or of each (None).

    Raises VgenError when `path` is no dataset, or has no such split.
    """
    file = token_file(path, split or "train")
    if file:
        return _describe_tokens(file, examples)
    data = open_data(path, held_out)
    lines = [str(data.report), *_licence_lines(layout(path).manifest)]
    for name in data.splits if split is None else [find_split(split, data.splits, path)]:
        source = data.source(name)
        captions = [sample.caption for sample in source.samples]
        lines += [f"{name}:", *(f"  {line}" for line in _class_lines(source.labels, source.class_names))]
        lines += [f"  {line}" for line in _caption_lines(captions, examples)]
    return "\n".join(lines)


def _describe_tokens(file: Path, examples: int) -> str:
    dataset = TokenDataset(file)
    count, variants = len(dataset), dataset.variants
    lines = [
        f"{file}: {dataset.kind}",
        f"samples: {count}" + (f" with {variants} variants each" if variants > 1 else ""),
        f"tokens: grid {'x'.join(map(str, dataset.grid))}, {_values(dataset)}, tokenizer {dataset.tokenizer}",
        *_class_lines(dataset.labels, dataset.class_names),
        *_caption_lines(dataset.captions, examples),
    ]
    return "\n".join(lines)


def token_file(path: str | Path, split: str) -> Path | None:
    """The token set of a split, where `path` is one or a folder that `vgen tokenize` wrote; None for other data."""
    path = Path(path)
    file = path / f"{split}.safetensors" if path.is_dir() else path
    return file if file.suffix == ".safetensors" and (file.is_file() or file == path) else None


def contact_sheet(dataset: ImageDataset, out: str | Path, limit: int = 196, columns: int = 14) -> int:
    """Writes a PNG of the first `limit` readable pictures with their captions below; returns how many there are."""
    font = ImageFont.load_default()
    width = max(96, dataset.size + 8)
    height = dataset.size + 44
    items = list(islice(dataset.readable(), limit))
    columns = min(columns, len(items))
    sheet = Image.new("RGB", (columns * width, -(-len(items) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, item in enumerate(items):
        left, top = number % columns * width, number // columns * height
        pixels = ((item["image"] + 1) * 127.5).round().clamp(0, 255).byte()
        sheet.paste(F.to_pil_image(pixels), (left + (width - dataset.size) // 2, top + 2))
        lines = textwrap.wrap(item["caption"] or item["key"], width // 6)[:3]
        draw.multiline_text((left + 2, top + dataset.size + 4), "\n".join(lines), fill="black", font=font, spacing=1)
    save_picture(sheet, out)
    return len(items)


def _values(dataset: TokenDataset) -> str:
    """What the tokens are, in words."""
    if dataset.vocabulary is not None:
        return f"vocabulary {dataset.vocabulary}, {len(dataset.tokens.unique())} codes used"
    low = dataset.spec.low_grid
    smaller = f" and a smaller picture of {'x'.join(map(str, low))}" if low else ""
    return f"{dataset.spec.channels} floats each (standard deviation {dataset.tokens.float().std():.2f}){smaller}"


def _class_lines(labels: Sequence[int], class_names: Sequence[str]) -> list[str]:
    counts = Counter(label for label in labels if label >= 0)
    if not counts:
        return ["classes: none"]
    names = dict(enumerate(class_names))
    largest = ", ".join(f"{names.get(label, label)} ({count})" for label, count in counts.most_common(8))
    return [f"classes: {len(counts)} of {len(class_names) or len(counts)}, the largest: {largest}"]


def _caption_lines(captions: list[str], examples: int) -> list[str]:
    given = [caption for caption in captions if caption]
    if not given:
        return ["captions: none"]
    different = list(dict.fromkeys(given))
    step = max(1, len(different) // max(1, examples))
    return [
        f"captions: {len(given)} ({len(different)} different), such as",
        *(f"  {caption}" for caption in different[::step][:examples]),
    ]


def _licence_lines(manifest: Mapping[str, Any]) -> list[str]:
    licences = manifest.get("licences")
    return [f"licence of the {part}: {text}" for part, text in licences.items()] if isinstance(licences, dict) else []
