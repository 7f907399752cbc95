"""`vgen tokenize`: caches the visual tokens of a dataset, for training generators."""

from __future__ import annotations

import argparse
from pathlib import Path

from vgen.cli.arguments import device, existing_data, number, picture_size, usable_device, whole, writable_folder

EPILOG = """examples:
  vgen tokenize --model runs/emoji/tokenizer/model --data data/emoji --out runs/tokens/emoji
  vgen tokenize --model … --data … --out … --flips               add mirror images of the training pictures
  vgen tokenize --model … --data … --out … --variants 8          add eight random crops of every training picture
  vgen tokenize --model … --data … --out … --ten-crop            add the ten crops that ImageNet recipes train on
  vgen tokenize --model emoji-kl --data … --out … --low-res 32   continuous latents, also of the pictures at 32 px (Hi-MAR)

Writes OUT/SPLIT.safetensors and OUT/SPLIT.json for every split. Interrupted, the same command continues. Run again, it codes what
changed since (pictures, tokenizer, settings; for captions, labels and class names the tokens stay) and keeps the rest."""
PLUGINS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vgen tokenize`."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|FOLDER",
        type=Path,
        help="a shipped tokenizer (such as emoji-kl), or a folder that `vgen train` or `vgen convert` wrote",
    )
    parser.add_argument(
        "--data", required=True, metavar="PATH", type=Path, help="image folder, shards, or a pattern of them (d/*.tar)"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", type=Path, help="where the token sets go")
    parser.add_argument(
        "--size",
        type=picture_size,
        metavar="S|HxW",
        help="side of the pictures in pixels, or height x width (default: from the dataset's manifest)",
    )
    parser.add_argument("--flips", action="store_true", help="add mirror images of the training pictures")
    parser.add_argument(
        "--variants", type=whole(0), default=0, metavar="N", help="add N random crops of every training picture"
    )
    parser.add_argument(
        "--min-scale",
        type=number(0, 1, above=True),
        default=0.8,
        metavar="S",
        help="smallest crop, as a share of a side (default 0.8)",
    )
    parser.add_argument(
        "--ten-crop",
        type=number(1, above=True),
        nargs="?",
        const=1.1,
        default=0.0,
        metavar="RANGE",
        help="add the four corners, the centre and their mirror images of every training picture at RANGE times the size "
        "(default 1.1), as LlamaGen, PAR, NAR and RAR were trained",
    )
    parser.add_argument(
        "--low-res",
        type=picture_size,
        default=0,
        metavar="S|HxW",
        help="continuous tokenizers: add the latents of the same pictures at this size, which Hi-MAR starts from",
    )
    parser.add_argument(
        "--held-out",
        default="auto",
        metavar="N|P%",
        help="so many training pictures, or such a share, become the split heldout (default: 5%% where the data has no other split)",
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=32, metavar="B", help="pictures coded together (default 32)"
    )
    parser.add_argument("--device", type=device, metavar="NAME", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument("--threads", type=whole(0), default=0, metavar="N", help="CPU threads (default: torch decides)")


def check(args: argparse.Namespace) -> None:
    """What can be refused before torch is imported."""
    from vgen.tokenizers_vis.registry import saved_family

    saved_family(args.model)
    existing_data("--data", args.data)
    writable_folder("--out", args.out)


def run(args: argparse.Namespace) -> None:
    """Caches every split and prints code usage and round-trip PSNR."""
    import torch

    from vgen.data.caching import cache_tokens

    if args.threads:
        torch.set_num_threads(args.threads)
    cache_tokens(
        args.model,
        args.data,
        args.out,
        size=args.size,
        flips=args.flips,
        variants=args.variants,
        min_scale=args.min_scale,
        ten_crop=args.ten_crop,
        low_res=args.low_res,
        held_out=args.held_out,
        batch_size=args.batch_size,
        device=usable_device(args.device),
    )
