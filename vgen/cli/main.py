"""`vgen <command>`: one table of commands, loaded when they are used, and the one place where errors become sentences."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from typing import NoReturn

from vgen import __version__
from vgen.errors import VgenError, in_words, nearest
from vgen.plugins import load_plugin

# command -> (module under vgen.cli, one-line summary). A module has EPILOG, add_arguments(parser), run(args) -> None, and may have
# PLUGINS = True, for --plugin, and check(args) -> None, which runs first: the values of arguments, files that must be there, places that must be writable. It must
# not import torch (tests/cli/test_main.py), so that what can be refused is refused at once.
COMMANDS = {
    "sample": ("sample", "make pictures from words, in any decode order"),
    "train": ("train", "train a tokenizer or a generator from a YAML config"),
    "configs": ("configs", "list the training configs that come with vgen, or print one"),
    "tokenize": ("tokenize", "cache the visual tokens of a dataset"),
    "convert": ("convert", "turn a published checkpoint into a folder that vgen and diffusers load"),
    "reconstruct": ("reconstruct", "send pictures through a tokenizer and back, and measure what is lost"),
    "data": ("data", "build or inspect datasets (e.g. `vgen data emoji`)"),
    "orders": ("orders", "draw the decode orders and their number of forward passes"),
}

EPILOG = """start with
  vgen sample                                   16 pictures by the model that comes with vgen, in outputs/samples.png
  vgen sample --prompt ghost --order raster     another order; `vgen orders` lists all
  vgen data info FOLDER                         what training would read of your pictures
  vgen configs                                  what can be trained, then `vgen train NAME data.path=FOLDER out=RUN`
  vgen COMMAND --help                           each command, with examples
"""

PLUGIN_HELP = "a module (or .py file) of yours with orders, tokenizers or models; repeatable (docs/architecture.md)"


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are VgenErrors with the nearest option or command, not a usage of forty lines."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # said by the parser of the command, which knows its options
            self.error(self._leftover(rest[0]))
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (?:\S+/)?(\S+?): ", r"\1: ", message)
        if found := re.match(r"(\S+): invalid choice: '(.*)' \(choose from (.*)\)$", message):
            choices = found[3].replace("'", "")
            message = f"{found[1]} is one of {choices}; got {found[2]!r}{nearest(found[2], choices.split(', '))}"
        raise VgenError(f"{message}; `{self.prog} --help` explains the options")

    def _leftover(self, word: str) -> str:
        settings = any(action.metavar == "key=value" for action in self._actions)
        if not word.startswith("-"):
            place = "; settings stand right behind CONFIG, options before it or after them" if settings else ""
            return f"{word!r} is one argument too many{place}"
        option = word.partition("=")[0]
        close = nearest(option, [known for known in self._option_string_actions if known.startswith("--")])
        if settings and not close:
            close = f", settings are written without dashes ({option.lstrip('-')}=…)"
        return f"there is no option {option}{close}"


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; only the module of `command` is imported, so that `vgen --help` is instant."""
    parser = Parser(
        prog="vgen",
        description="Autoregressive image and video generation: any tokenizer, any generator, any order.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vgen {__version__}")
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
            if getattr(module, "PLUGINS", False):
                sub.add_argument("--plugin", action="append", default=[], metavar="MODULE", help=PLUGIN_HELP)
            sub.set_defaults(run=module.run, check=getattr(module, "check", None))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0; 2 for bad input (one sentence on stderr); 1 for a fault of vgen or too
    little memory; 130 when interrupted; 141 when the reader of our output has gone."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if word in COMMANDS), None)
    try:
        args = build_parser(command).parse_args(argv)
        for name in getattr(args, "plugin", ()):
            load_plugin(name)
        if args.check is not None:
            args.check(args)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone (`| head`); Python would complain once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{_name(command)}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        code, sentence = in_words(error)
        print(f"{_name(command)}: {sentence}", file=sys.stderr)
        return code
    return 0


def _name(command: str | None) -> str:
    return "vgen" if command is None else f"vgen {command}"


if __name__ == "__main__":
    sys.exit(main())
