"""`vgen reconstruct`: pictures through a tokenizer and back, with figures."""

from __future__ import annotations

import argparse
import json
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
        "--split", default="heldout", help="which split of a dataset (default: heldout, else all there is)"
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
    existing_data("--input", args.input)
    existing("--checkpoint-dir", args.checkpoint_dir, "folder")
    if (args.lpips_vgg is None) != (args.lpips_heads is None):
        raise VgenError("LPIPS needs both --lpips-vgg and --lpips-heads")
    existing("--lpips-vgg", args.lpips_vgg, "file")
    existing("--lpips-heads", args.lpips_heads, "file")
    writable_file("--out", args.out, (".png", ".webp"))


def run(args: argparse.Namespace) -> None:
    """Loads, reconstructs, writes the sheet and prints a line per number of tokens."""
    from tqdm import tqdm

    from vgen.eval import reconstruction
    from vgen.eval.reconstruction import cost, joined, reconstruct_batches
    from vgen.files import atomic_path
    from vgen.layers.pixels import to_images
    from vgen.viz.sheets import sheet

    device = usable_device(args.device)
    tokenizer = load_tokenizer(args.model, args.checkpoint_dir)
    size = height, width = reconstruction.picture_size(tokenizer.spec, args.size, _manifest_size(args.input) or 256)
    pixels = load_pictures(args.input, args.split, size)
    pixels = pixels[: args.count] if args.count else pixels
    lpips = _lpips(args.lpips_vgg, args.lpips_heads) if args.lpips_vgg else None
    tokenizer.to(device)

    shown = min(args.shown, len(pixels))
    images, labels = to_images(pixels[:shown]), ["original"] * shown
    rows = []
    for kept in args.num_tokens or [None]:
        batches = reconstruct_batches(
            tokenizer, pixels, kept, steps=args.steps, guidance=args.guidance, lpips=lpips, batch_size=args.batch_size
        )
        total = -(-len(pixels) // args.batch_size)
        result = joined(list(tqdm(batches, total=total, unit="batch", desc="reconstructing", delay=1, leave=False)))
        price, means = cost(tokenizer.spec, height, width, kept), result.means()
        rows.append(
            {"tokens": price.tokens, "bits_per_pixel": price.bits_per_pixel, "compression": price.compression, **means}
        )
        images += to_images(result.reconstruction[:shown])
        unit = "token" if price.tokens == 1 else "tokens"
        labels += [f"{price.tokens} {unit}, {value:.1f} dB" for value in result.figures["psnr"][:shown].tolist()]
        figures = f"PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.3f}" + (
            f", LPIPS {means['lpips']:.3f}" if lpips is not None else ""
        )
        print(
            f"{len(pixels)} pictures of {height if height == width else f'{height} x {width}'} px, {price.tokens} {unit} each ({price.bits_per_pixel:.3g} bits per pixel, "
            f"1/{price.compression:.0f} of raw pixels): {figures}"
        )
    with atomic_path(args.out) as temporary:
        sheet(images, labels, columns=shown, scale=max(1, 128 // height)).save(temporary)
    print(f"sheet: {args.out}")
    if args.json:
        print(
            json.dumps(
                {
                    "model": args.model,
                    "pictures": len(pixels),
                    "size": height if height == width else size,
                    "rows": rows,
                    "out": str(args.out),
                }
            )
        )


def load_tokenizer(model: str, checkpoint_dir: Path | None = None):
    """A shipped or published tokenizer by name, or a folder. Raises VgenError when there is none of these."""
    from vgen.convert.load import load_published_tokenizer
    from vgen.convert.published import names
    from vgen.errors import VgenError, nearest
    from vgen.tokenizers_vis.registry import SHIPPED, open_tokenizer, shipped_tokenizer

    if Path(model).is_dir():
        return open_tokenizer(model)
    if model in SHIPPED:
        return shipped_tokenizer(model)
    published = names(kind="tokenizer")
    if model in published:
        return load_published_tokenizer(model, checkpoint_dir)
    raise VgenError(
        f"there is no tokenizer {model!r}{nearest(model, [*SHIPPED, *published])}; --model takes a shipped one ({', '.join(SHIPPED)}), "
        f"a published one ({', '.join(published)}) or a folder"
    )


def load_pictures(path: Path, split: str, size: int | tuple[int, int]) -> Tensor:
    """[M, 3, H, W] in [-1, 1] of `size` (H, W), or of a side: one picture, or a split of a dataset (all of it where it is not divided)."""
    import torch

    from vgen.data.dataset import open_images
    from vgen.data.images import read_image, view
    from vgen.data.sources import splits_of

    if path.is_file() and path.suffix != ".tar":
        return view(read_image(path), size, None, None)[None]
    known = splits_of(path)
    dataset = open_images(path, split if split in known else known[0], size)
    return torch.stack([item["image"] for item in dataset.readable()])


def _manifest_size(path: Path) -> int | None:
    manifest = path / "manifest.json"
    return int(json.loads(manifest.read_text(encoding="utf-8"))["image_size"]) if manifest.is_file() else None


def _lpips(vgg: Path, heads: Path):
    from vgen.tokenizers_vis.perceptual import LPIPS

    return LPIPS.from_files(vgg, heads).eval()
