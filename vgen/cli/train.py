"""`vgen train`: trains a tokenizer or a generator from a YAML config."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """examples:
  vgen train emoji/tokenizer                       start, or continue after a stop, crash or kill
  vgen train emoji/tokenizer steps=2000 optimizer.lr=5e-4 out=runs/try
  vgen train mine.yaml                             a config of your own: `vgen configs emoji/tokenizer > mine.yaml` is a start
  vgen train emoji/tokenizer --dry-run             check the config and count parameters
  vgen train emoji/anyorder --export model/        write the model of the newest checkpoint
  accelerate launch --num_processes 4 -m vgen.train emoji/anyorder             several GPUs
  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m vgen.train emoji/anyorder   several CPU processes

Settings (key=value) stand right behind CONFIG, options before it or after them.
Ctrl-C finishes the step, saves and stops; the same command continues with bit-identical results.
Exit codes: 0 when all steps are done and the model is written, 130 after Ctrl-C, 143 after SIGTERM, 124 after
time_limit_minutes, 2 for bad input: `vgen train … && vgen tokenize …` goes on with finished models only."""
PLUGINS = True


def check(args: argparse.Namespace) -> None:
    """Refuses, before torch is imported, what no look at the data is needed for."""
    from vgen.files import check_folder
    from vgen.train.config import check_places, read_layers

    _, file, changes = read_layers(args.config, args.overrides)
    if args.export:
        check_folder(args.export)
    elif not args.dry_run:
        check_places(file, changes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vgen train`."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a config that comes with vgen (`vgen configs`), e.g. emoji/tokenizer, or the path of a YAML file",
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings that replace those of the file"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check what is there, print the resolved config and parameter counts; data may be missing yet",
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="continue a run although settings that change its weights differ"
    )
    parser.add_argument(
        "--export", metavar="FOLDER", type=Path, help="do not train: write the averaged model of a checkpoint here"
    )
    parser.add_argument(
        "--checkpoint", metavar="WHICH", default="last", help="with --export: last, best, or a step number"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="with --export: dtype of the weights",
    )


def run(args: argparse.Namespace) -> None:
    """Checks the config, then trains, exports or reports. Leaves with the exit code of a training that was stopped."""
    from vgen.train.loop import describe, export_checkpoint, train
    from vgen.train.system import load_config

    if args.dry_run:
        print(describe(args.config, args.overrides))
        return
    config = load_config(args.config, args.overrides)
    if args.export:
        checkpoint = export_checkpoint(config, args.checkpoint, args.export, args.dtype)
        print(f"wrote the model of step {checkpoint.step} to {args.export}")
    else:
        summary = train(config, allow_changes=args.allow_changes)
        if summary.exit_code:
            raise SystemExit(summary.exit_code)
