"""`vgen convert`: a published checkpoint, or somebody's VQGAN file, becomes a folder in the format of diffusers."""

from __future__ import annotations

import argparse
from pathlib import Path

from vgen.cli.arguments import existing, writable_folder
from vgen.errors import VgenError
from vgen.files import atomic_folder, check_folder

EPILOG = """examples:
  vgen convert llamagen-vq16 --out checkpoints/llamagen-vq16            a tokenizer, for `vgen tokenize` and training
  vgen convert llamagen-c2i-B-256 --out models/llamagen-B               a pipeline, for `vgen sample --model`
  vgen convert rar-B-256 --checkpoint-dir ~/downloads --out models/rar  from files that are here already
  vgen convert downloads/last.ckpt --out checkpoints/vqgan              somebody's VQGAN (taming-transformers) or VAE (LDM)
  vgen convert --list                                                   all published checkpoints, with their licences
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vgen convert`."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME|FILE",
        help="a published checkpoint (see --list), or the file (or a folder with one) of a VQGAN or VAE",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the model or pipeline goes; must not exist yet"
    )
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="FOLDER",
        help="where the files are (default: the hub's cache, or download)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the saved weights (default float32)",
    )
    parser.add_argument("--list", action="store_true", help="print what is known about every checkpoint and stop")


def check(args: argparse.Namespace) -> None:
    """What can be refused before torch is imported."""
    if args.list:
        return
    if args.name is None or args.out is None:
        raise VgenError(
            "give the name of a published checkpoint and --out FOLDER; `vgen convert --list` prints the names"
        )
    if args.out.exists():
        raise VgenError(f"--out {args.out} exists already; choose a new folder")
    writable_folder("--out", args.out)
    check_folder(args.out)
    existing("--checkpoint-dir", args.checkpoint_dir, "folder")
    from vgen.convert.published import published

    if not _is_file(args.name) and published(args.name).kind == "text_encoder":
        raise VgenError(
            f"{args.name} is a text encoder, which transformers loads as it is; name a generator or a tokenizer"
        )


def run(args: argparse.Namespace) -> None:
    """Lists, or loads and saves."""
    from vgen.convert.published import names, published

    if args.list:
        for name in names():
            entry = published(name)
            doubts = f"; not verified: {', '.join(entry.unverified)}" if entry.unverified else ""
            print(f"{name:28} {entry.kind:13} {entry.source}; weights: {entry.weights_licence}{doubts}")
        return

    import torch

    from vgen.convert.load import load_file, load_published, load_published_tokenizer

    dtype = getattr(torch, args.dtype)
    if _is_file(args.name):
        result = load_file(args.name)
        parts, what = [result], f"{type(result).__name__} of {args.name}, {args.dtype}"
    else:
        entry = published(args.name)
        if entry.kind == "tokenizer":
            result = load_published_tokenizer(args.name, args.checkpoint_dir)
            parts = [result]
        else:
            result = load_published(args.name, args.checkpoint_dir)
            parts = [result.tokenizer, result.model]
        licences = f"code {entry.code_licence}, weights {entry.weights_licence}"
        what = f"{args.name} ({entry.kind}), {args.dtype}; {licences}"
    for part in parts:
        torch.nn.Module.to(part, dtype)
    with atomic_folder(args.out) as temporary:
        result.save_pretrained(temporary)
    print(f"{args.out}: {what}")


def _is_file(name: str) -> bool:
    """Whether a file or folder is meant: published names win over folders that are called like them."""
    from vgen.convert.published import names

    return name not in names() and Path(name).exists()
