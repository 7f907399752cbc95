"""`vgen configs`: the training configs that come with vgen."""

from __future__ import annotations

import argparse

from vgen.recipes import config_names, config_summary, find_config

EPILOG = """examples:
  vgen configs                                 all of them, a line each
  vgen configs emoji                           those whose name begins so
  vgen configs emoji/anyorder                  one, as it is
  vgen configs emoji/anyorder > mine.yaml      a start for one of your own: `vgen train mine.yaml`
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vgen configs`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this config, or list those of a folder (emoji)")


def run(args: argparse.Namespace) -> None:
    """Prints the list, a folder's part of it, or a file."""
    listed = [name for name in config_names() if args.name is None or name.startswith(f"{args.name.rstrip('/')}/")]
    if not listed:
        print(find_config(args.name).read_text(encoding="utf-8"), end="")
        return
    width = max(map(len, listed))
    for name in listed:
        print(f"{name:<{width}}  {config_summary(name)}")
