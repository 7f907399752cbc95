"""`vgen <command>`: one table of commands, loaded when they are used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

from vgen.errors import VgenError

# command -> (module under vgen.cli, one-line summary). A module has EPILOG, add_arguments(parser) and run(args) -> None.
COMMANDS = {
    "sample": ("sample", "make pictures from words, in any decode order"),
    "train": ("train", "train a tokenizer or a generator from a YAML config"),
    "tokenize": ("tokenize", "cache the visual tokens of a dataset"),
    "convert": ("convert", "turn a published checkpoint into a folder that vgen and diffusers load"),
    "reconstruct": ("reconstruct", "send pictures through a tokenizer and back, and measure what is lost"),
    "data": ("data", "build or inspect datasets (e.g. `vgen data emoji`)"),
    "orders": ("orders", "draw the decode orders and their number of forward passes"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; only the module of `command` is imported, so that `vgen --help` is instant."""
    parser = argparse.ArgumentParser(
        prog="vgen", description="Autoregressive image and video generation: any tokenizer, any generator, any order."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        chosen = name == command
        module = importlib.import_module(f"vgen.cli.{module_name}") if chosen else None
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=module.EPILOG if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the full traceback of an error")
        if module:
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for bad input (one sentence on stderr), 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if word in COMMANDS), None)
    args = build_parser(command).parse_args(argv)
    try:
        args.run(args)
    except VgenError as error:
        if args.debug:
            traceback.print_exc()
        print(f"vgen {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vgen {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone (`| head`); Python would complain once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
