"""`vgen reconstruct`: pictures through a tokenizer and back, with figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from vgen.cli.arguments import (
    device,
    existing,
    existing_data,
    number,
    picture_size,
    usable_device,
    whole,
    writable_file,
)
from vgen.convert.load import check_tokenizer, load_tokenizer
from vgen.errors import VgenError

if TYPE_CHECKING:
    from torch import Tensor

EPILOG = """examples:
  vgen reconstruct --model emoji-vq --input data/emoji --out outputs/vq.png
  vgen reconstruct --model runs/emoji/flextok/model --input data/emoji --num-tokens 1 4 16 64 --out outputs/strip.png
  vgen reconstruct --model llamagen-vq16 --checkpoint-dir ~/files --input photo.jpg --size 512 --out outputs/photo.png
  vgen reconstruct --model runs/emoji/kl/model --input my/pictures --json

Originals above, reconstructions below; PSNR and SSIM are means over all pictures (LPIPS with --lpips-vgg and --lpips-heads).
"""
PLUGINS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vgen reconstruct`."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|FOLDER",
        help="a shipped tokenizer, a published one, or a folder written by `vgen train`",
    )
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="FOLDER",
        help="where the files of a published tokenizer are (default: the hub)",
    )
    parser.add_argument("--input", required=True, type=Path, metavar="PATH", help="a picture, a folder, or shards")
    parser.add_argument(
        "--split", metavar="NAME", help="which split of a dataset (default: heldout; without one, says which is taken)"
    )
    parser.add_argument(
        "--count", type=whole(0), default=0, metavar="N", help="only the first N pictures (default, and 0: all)"
    )
    parser.add_argument("--shown", type=whole(1), default=12, metavar="N", help="pictures on the sheet (default 12)")
    parser.add_argument(
        "--size",
        type=picture_size,
        metavar="S|HxW",
        help="side in pixels, or height x width, of the centre that is cut out (default: the tokenizer's, the dataset's, or 256)",
    )
    parser.add_argument(
        "--num-tokens",
        type=whole(1),
        nargs="+",
        metavar="K",
        help="keep K tokens; several: a row each (flexible tokenizers)",
    )
    parser.add_argument("--steps", type=whole(1), metavar="N", help="substeps of a generative decoder")
    parser.add_argument("--guidance", type=number(), metavar="S", help="guidance scale of a generative decoder")
    parser.add_argument("--lpips-vgg", type=Path, metavar="FILE", help="torchvision's VGG16 weights, for LPIPS")
    parser.add_argument("--lpips-heads", type=Path, metavar="FILE", help="the five heads of LPIPS")
    parser.add_argument(
        "--batch-size", type=whole(1), default=16, metavar="B", help="pictures coded together (default 16)"
    )
    parser.add_argument("--device", type=device, metavar="NAME", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/reconstruction.png"), metavar="FILE", help="the sheet (.png or .webp)"
    )
    parser.add_argument("--json", action="store_true", help="the figures as the last line of stdout")


def check(args: argparse.Namespace) -> None:
    """What can be refused before torch is imported."""
    check_tokenizer(args.model)
    existing_data("--input", args.input)
    if args.split is not None and (args.input.is_dir() or not args.input.is_file()):
        from vgen.data.sources import splits_of
        from vgen.data.splits import find_split

        find_split(args.split, splits_of(args.input), args.input)
    existing("--checkpoint-dir", args.checkpoint_dir, "folder")
    if (args.lpips_vgg is None) != (args.lpips_heads is None):
        raise VgenError("LPIPS needs both --lpips-vgg and --lpips-heads")
    existing("--lpips-vgg", args.lpips_vgg, "file")
    existing("--lpips-heads", args.lpips_heads, "file")
    writable_file("--out", args.out, (".png", ".webp"))


def run(args: argparse.Namespace) -> None:
    """Loads, reconstructs, writes the sheet and prints a line per number of tokens."""
    from tqdm import tqdm

    from vgen.data.batches import large_batch
    from vgen.eval import reconstruction
    from vgen.eval.reconstruction import cost, measure
    from vgen.layers.picture_files import save_picture
    from vgen.layers.pixels import to_images
    from vgen.viz.sheets import sheet

    device = usable_device(args.device)
    tokenizer = load_tokenizer(args.model, checkpoint_dir=args.checkpoint_dir)
    size = height, width = reconstruction.picture_size(tokenizer.spec, args.size, _size_of(args.input) or 256)
    pictures = open_pictures(args.input, args.split, size)
    print(pictures.found)
    total = min(args.count or pictures.count, pictures.count)
    if note := large_batch(args.batch_size, total):
        print(note)
    lpips = _lpips(args.lpips_vgg, args.lpips_heads) if args.lpips_vgg else None
    tokenizer.to(device)

    bar = tqdm(
        islice(pictures.items, args.count or None),
        total=total,
        unit="image",
        desc="reconstructing",
        delay=1,
        leave=False,
        disable=None,
    )
    settings = {"steps": args.steps, "guidance": args.guidance, "lpips": lpips, "batch_size": args.batch_size}
    originals, measured = measure(tokenizer, bar, args.num_tokens or [None], shown=args.shown, **settings)
    count, shown = len(measured[0].figures["psnr"]), len(originals)
    images, labels = to_images(originals), ["original"] * shown
    rows = []
    for result in measured:
        price, means = cost(tokenizer.spec, height, width, result.num_tokens), result.means()
        rows.append(
            {"tokens": price.tokens, "bits_per_pixel": price.bits_per_pixel, "compression": price.compression, **means}
        )
        images += to_images(result.shown)
        unit = "token" if price.tokens == 1 else "tokens"
        labels += [f"{price.tokens} {unit}, {value:.1f} dB" for value in result.figures["psnr"][:shown].tolist()]
        figures = f"PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.3f}" + (
            f", LPIPS {means['lpips']:.3f}" if lpips is not None else ""
        )
        print(
            f"{count} pictures of {height if height == width else f'{height} x {width}'} px, {price.tokens} {unit} each ({price.bits_per_pixel:.3g} bits per pixel, "
            f"1/{price.compression:.0f} of raw pixels): {figures}"
        )
    save_picture(sheet(images, labels, columns=shown, scale=max(1, 128 // height)), args.out)
    print(f"sheet: {args.out}")
    if args.json:
        named = {"model": args.model, "split": pictures.split, "pictures": count}
        named["size"] = height if height == width else size
        print(json.dumps({**named, "rows": rows, "out": str(args.out)}))


@dataclass(frozen=True)
class Pictures:
    """Pictures [3, H, W] in [-1, 1], read one after the other as they are taken; count: of them and of those that turn out
    unreadable; split: its name (None: one picture, which is no dataset); found: what there is and what of it is measured."""

    items: Iterator[Tensor]
    count: int
    split: str | None
    found: str


def open_pictures(path: Path, split: str | None, size: int | tuple[int, int]) -> Pictures:
    """One picture, or a split of a dataset. split: None is heldout; where there is none, another one, and `found` says which.

    Raises VgenError for a split that does not exist, listing those that do, and for what is no data.
    """
    from vgen.data.dataset import open_images
    from vgen.data.images import read_image, view
    from vgen.data.sources import open_data
    from vgen.data.splits import held_out_among

    if path.is_file() and path.suffix != ".tar":
        if split is not None:
            raise VgenError(f"{path} is one picture and has no split {split!r}; leave --split out")
        return Pictures(iter([view(read_image(path), size, None, None)]), 1, None, f"{path}: one picture")
    data = open_data(path)
    chosen = split or held_out_among(data.splits) or "train"
    dataset = open_images(data, chosen, size)
    note = f"measured: the {len(dataset)} pictures of split {chosen}"
    if split is None and chosen != "heldout":
        seen = "; a tokenizer trained on this data has seen them" if chosen == "train" else ""
        note += f", for the data has no split heldout (it has {', '.join(data.splits)}){seen}"
    items = (item["image"] for item in dataset.readable())
    return Pictures(items, len(dataset), chosen, f"{data.report}\n{note}")


def load_pictures(path: Path, split: str | None, size: int | tuple[int, int]) -> Tensor:
    """All pictures of `open_pictures` at once: [M, 3, H, W]."""
    import torch

    return torch.stack(list(open_pictures(path, split, size).items))


def _size_of(path: Path) -> int | None:
    """What the dataset's manifest says; None of a single picture."""
    from vgen.data.splits import manifest_size

    return None if path.is_file() and path.suffix != ".tar" else manifest_size(path)


def _lpips(vgg: Path, heads: Path):
    from vgen.tokenizers_vis.losses.perceptual import LPIPS

    return LPIPS.from_files(vgg, heads).eval()
