"""`vgen data`: build and inspect datasets."""

from __future__ import annotations

import argparse
from pathlib import Path

from vgen.cli.arguments import existing, existing_data, whole, writable_file, writable_folder

EPILOG = """examples:
  vgen data emoji --out data/emoji --size 64
  vgen data emoji --out data/emoji --archives ~/Downloads     # archives made by `npm pack` elsewhere
  vgen data info data/emoji --sheet sheet.png                 # what is found, used and skipped in every split
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    emoji = actions.add_parser(
        "emoji",
        help="build the Fluent 3D emoji with captions, as WebDataset shards",
        description="Build 1,852 captioned emoji (MIT licence) as WebDataset shards, split into train and heldout. The archives "
        "come through npm; docs/emoji.md says what is in them.",
    )
    emoji.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="where the dataset goes; a rerun resumes it"
    )
    emoji.add_argument(
        "--size", type=whole(1), default=64, metavar="S", help="side of the pictures in pixels (default: %(default)s)"
    )
    emoji.add_argument(
        "--shard-size", type=whole(1), default=1000, metavar="N", help="pictures per shard (default: %(default)s)"
    )
    emoji.add_argument(
        "--archives", type=Path, metavar="FOLDER", help="folder with both npm archives (default: fetch with npm)"
    )
    emoji.set_defaults(act=_emoji)
    info = actions.add_parser(
        "info",
        help="say what a dataset holds",
        description="Say what training would read: pictures found, used and skipped in every split and why, classes, captions. "
        "docs/data.md tells how they are found.",
    )
    info.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="an image folder, shards (a folder, a file, 'd/*.tar', 'd/train-{000..009}.tar'), or a token set",
    )
    info.add_argument("--split", help="classes and captions of this split (default: of every split)")
    info.add_argument(
        "--held-out",
        metavar="SHARE|N",
        help="show the split that training would hold out of data without one: 5%% or a number of pictures",
    )
    info.add_argument("--sheet", type=Path, metavar="FILE", help="also draw a contact sheet with captions")
    info.set_defaults(act=_info)


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything heavy is imported."""
    if args.action == "emoji":
        writable_folder("--out", args.out)
        existing("--archives", args.archives, "folder")
    else:
        existing_data("PATH", args.path)
        writable_file("--sheet", args.sheet, (".png", ".webp", ".jpg"))


def run(args: argparse.Namespace) -> None:
    args.act(args)


def _emoji(args: argparse.Namespace) -> None:
    from vgen.data.emoji import build_emoji

    manifest = build_emoji(args.out, size=args.size, shard_size=args.shard_size, archives=args.archives)
    counts = manifest["counts"]
    print(
        f"{args.out}: {counts['pictures']} pictures of {manifest['image_size']} px ({counts['train']} train, {counts['heldout']} held out), "
        f"{counts['captions']} captions, {counts['classes']} classes; "
        f"{counts['names_without_picture']} names without a picture, {counts['pictures_without_name']} pictures without a name (skin tones, second names)"
    )


def _info(args: argparse.Namespace) -> None:
    from vgen.data.dataset import open_images
    from vgen.data.info import contact_sheet, describe, token_file
    from vgen.data.sources import splits_of
    from vgen.errors import VgenError

    if args.sheet and token_file(args.path, args.split or "train"):
        raise VgenError("a token set has no pictures: --sheet needs an image folder or shards")
    print(describe(args.path, args.split, held_out=args.held_out))
    if args.sheet:
        split = args.split or splits_of(args.path, args.held_out)[0]
        dataset = open_images(args.path, split, held_out=args.held_out)
        shown = contact_sheet(dataset, args.sheet)
        dataset.report_bad_files()
        print(f"{args.sheet}: {shown} pictures")
