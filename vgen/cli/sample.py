"""`vgen sample` (and `python sample.py`): pictures from words or classes."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.cli.arguments import add_setting, device, existing, margins, picture_size, usable_device, whole, writable_file
from vgen.cli.sample_files import OneFile, SampleFolder, caption, destination
from vgen.convert.load import check_pipeline, load_as
from vgen.data.text import BadFile, read_text
from vgen.errors import VgenError
from vgen.samplers.orders import read_order
from vgen.saved import read_json

if TYPE_CHECKING:
    from vgen.pipelines.results import Batch
    from vgen.pipelines.visual import Sampler
    from vgen.samplers.types import Order

PROMPTS = (
    "grinning face",
    "red apple",
    "cat face",
    "airplane",
    "birthday cake",
    "umbrella",
    "octopus",
    "red heart",
    "hamburger",
    "christmas tree",
    "soccer ball",
    "sunflower",
    "ghost",
    "police car",
    "strawberry",
    "flag of japan",
)

EPILOG = """examples:
  vgen sample                                         16 prompts in a labelled grid, outputs/samples.png
  vgen sample --prompt "red apple" --num-images 9     nine red apples
  vgen sample --prompt ghost --order raster           one token at a time; see `vgen orders` for all orders
  vgen sample --prompt ghost --order regions-4 --trace outputs/ghost.gif
  vgen sample --prompt "red heart" --init-image cat.png --mask white_is_new.png
  vgen sample --prompt sunflower --init-image sunflower.png --outpaint 25%,50%,25%,0
  vgen sample --list-words                            the words a prompt may use

  vgen sample --num-images 100 --out outputs/many     a folder, and samples.jsonl with the settings of every picture

Picture i of a run depends on --seed and i only, never on the batch size. A folder is written picture by picture: after Ctrl-C, a
kill or a full disk the same command makes what is missing, and --first 1600 continues behind picture 1599.
"""
PLUGINS = True
# Settings of a call, beside the order and its steps, that have an option: all numbers and names that are not a matter of training.
SETTINGS = (
    "guidance_scale",
    "guidance_schedule",
    "temperature",
    "top_k",
    "top_p",
    "substeps",
    "low_steps",
    "low_guidance_scale",
    "low_substeps",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vgen sample`, in groups."""
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="what the picture shows; repeatable")
    what.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="one prompt a line; empty lines and lines with # are skipped"
    )
    what.add_argument(
        "--class-label",
        action="append",
        metavar="K|NAME",
        help="class instead of a prompt, by number or name; repeatable",
    )
    what.add_argument(
        "--num-images", type=whole(1), default=1, metavar="N", help="pictures for each prompt (default 1)"
    )
    what.add_argument(
        "--model",
        default="emoji",
        metavar="NAME|FOLDER",
        help="a shipped model (emoji, the default), a published one (e.g. llamagen-c2i-B-256), a folder written by `vgen train`, "
        "or a repository of the hub (owner/name)",
    )
    what.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="FOLDER",
        help="where the files of a published model are (default: the hub's cache, or download)",
    )
    what.add_argument("--list-words", action="store_true", help="print the words the model knows and stop")
    how = parser.add_argument_group("how to decode")
    add_setting(how, "order")
    how.add_argument(
        "--order-option", action="append", default=[], metavar="KEY=VALUE", help="an option of the order; repeatable"
    )
    add_setting(how, "steps")
    for name in SETTINGS:
        add_setting(how, name)
    how.add_argument(
        "--size",
        type=picture_size,
        metavar="S|HxW",
        help="side, or height x width, in pixels, of models whose tokens leave it open (FlexTok's; default: what the model learned)",
    )
    how.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="0 to 4294967295 (default 0)")
    paint = parser.add_argument_group("in- and outpainting")
    paint.add_argument(
        "--init-image",
        type=Path,
        metavar="FILE",
        help="the picture to start from; the centre of one that has another shape than the model's pictures",
    )
    paint.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="as large as the picture: white areas are made anew, what lies under black ones stays",
    )
    paint.add_argument(
        "--outpaint",
        type=margins,
        metavar="L,T,R,B",
        help="new margins left, top, right and bottom, in pixels of the picture (16) or as a share of its side (25%%); one number: "
        "all four; 0: only what its shape lacks to that of the model's pictures, to which the whole is scaled",
    )
    paint.add_argument(
        "--paste-back",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="what stays has the picture's own pixels, with a soft seam to what is new (default), else what the tokenizer makes of them",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-size", type=whole(1), default=16, metavar="B", help="pictures decoded together (default 16)"
    )
    machine.add_argument("--device", type=device, metavar="NAME", help="cpu, cuda, mps (default: the best there is)")
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of all parts (default float32, a text encoder as it was trained with); noise is drawn in float32 always",
    )
    machine.add_argument(
        "--compile", action="store_true", help="torch.compile the transformer blocks (pays off for many pictures)"
    )
    out = parser.add_argument_group("results")
    out.add_argument(
        "--out",
        default="outputs/samples.png",
        metavar="PATH",
        help="a .png, .jpg, .webp or .avif file (one picture, or a labelled grid of up to 256), else a folder (FOLDER or FOLDER/) of "
        "numbered PNGs and samples.jsonl, their settings; the same command continues it",
    )
    out.add_argument(
        "--first",
        type=whole(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="number of the first picture (default 0): a run that goes on behind another one",
    )
    out.add_argument(
        "--overwrite",
        action="store_true",
        help="remove the pictures that samples.jsonl of the folder names (and nothing else) and make all anew",
    )
    out.add_argument("--trace", type=Path, metavar="FILE.gif", help="animation of the pictures appearing step by step")
    out.add_argument(
        "--json", action="store_true", help="settings, seconds, images/s, calls and tokens/s as the last line of stdout"
    )


def check(args: argparse.Namespace) -> None:
    """Looks at everything that can be refused without the model: prompts, options, files and places for results."""
    check_pipeline(args.model)
    if args.list_words:
        return
    _order_options(args.order_option)
    if args.order is not None:
        read_order(args.order)
    for option in ("init_image", "mask", "prompt_file"):
        existing(f"--{option.replace('_', '-')}", getattr(args, option), "file")
    writable_file("--trace", args.trace, (".gif", ".webp"))
    inputs = {path.resolve() for path in (args.init_image, args.mask, args.prompt_file, args.trace) if path}
    if Path(args.out).resolve() in inputs:
        raise VgenError(f"--out {args.out} is one of the other files of this command; give another name")
    if args.init_image or args.mask or args.outpaint:
        from vgen.pipelines.masks import read_parts

        read_parts(args.init_image, args.mask, args.outpaint)
    args.prompts = _prompts(args)  # once: a pipe (--prompt-file <(…)) gives its lines to the first who reads
    _destination(args)


def run(args: argparse.Namespace) -> None:
    """Loads, decodes, writes every picture when it is finished."""
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from vgen.pipelines.results import Stats
    from vgen.pipelines.visual import Sampler

    disable_progress_bar()  # loading takes a second; its bar would only hide our own lines
    pipe = load_as(
        Sampler,
        args.model,
        checkpoint_dir=args.checkpoint_dir,
        device=usable_device(args.device),
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
    )
    if args.list_words:
        vocabulary = pipe.model.vocabulary
        if vocabulary is None or vocabulary.words is None:
            raise VgenError(f"{args.model} has no list of words; it takes class labels or free text")
        print(" ".join(vocabulary.words))
        return

    from tqdm import tqdm

    from vgen.viz.trace import Trace, save_trace

    prompts, target = args.prompts, _destination(args)
    order = pipe.make_order(args.order, args.steps, args.seed, _order_options(args.order_option), args.low_steps)
    given = {
        **{name: getattr(args, name) for name in SETTINGS if name != "low_steps"},
        "substeps": int(args.substeps) if args.substeps and args.substeps.isdecimal() else args.substeps,
        "size": None if args.size is None else list(args.size),
    }
    settings = _settings(args, pipe, order, given)
    if args.compile:
        pipe.model.compile_repeated_blocks(dynamic=True)

    height, width = pipe.picture_size(given["size"])
    trace, stats, start = Trace() if args.trace else None, Stats(), time.perf_counter()

    def after_step(*state: Any) -> None:
        bar.update()
        if trace:
            trace(*state)

    # Everything is checked by now; a batch is put together when it is asked for, so that it can skip what the folder holds.
    batches = pipe.stream(
        prompts,
        args.class_label,
        num_images_per_prompt=args.num_images,
        first=args.first,
        skip=target.kept,
        batch_size=args.batch_size,
        order=order,
        seed=args.seed,
        init_image=args.init_image,
        mask=args.mask,
        outpaint=args.outpaint,
        paste_back=args.paste_back,
        callback_on_step_end=after_step,
        **given,
    )
    shown: Batch | None = None  # the first one, for the animation
    with (
        target.open(settings, (width, height)),
        tqdm(total=_calls(target, args.batch_size, order), unit="call", desc="decoding", delay=1, leave=False) as bar,
    ):
        try:
            for batch in batches:
                target.add([number - args.first for number in batch.numbers], batch.images)
                stats.add(batch)
                shown = shown or batch
        except KeyboardInterrupt:
            bar.close()
            print(target.progress(), file=sys.stderr)
            raise
    stats.seconds = time.perf_counter() - start
    report = stats.report()
    if target.kept:
        print(
            f"{len(target.kept)} of {len(target.subjects)} pictures were there already, with the same settings: {args.out}"
        )
    if stats.images:
        print(
            f"{stats.images} picture{'s' * (stats.images > 1)} in {report['seconds']:.1f} s ({report['images_per_second']:.1f}/s), "
            f"order {order.name}, {report['calls_per_batch']:.0f} forward passes: {args.out}"
        )
    if trace and shown:
        numbers = torch.tensor(shown.numbers[: trace.limit])
        condition = shown.condition.take(torch.arange(len(numbers)))
        decode = partial(pipe.decode_tokens, condition=condition, samples=numbers, seed=args.seed)
        labels = [caption(target.subjects[number - args.first]) for number in numbers.tolist()]
        frames = trace.frames(decode, labels)
        save_trace(frames, args.trace)
        print(f"step by step: {args.trace}")
    elif trace:
        print("nothing was decoded, so there is no animation; give another folder or --overwrite", file=sys.stderr)
    if args.json:
        print(
            json.dumps(
                {**settings, "batch_size": args.batch_size, "out": str(args.out), "kept": len(target.kept), **report}
            )
        )


def _calls(target: OneFile | SampleFolder, batch_size: int, order: Order) -> int:
    return math.ceil((len(target.subjects) - len(target.kept)) / batch_size) * order.calls


def _settings(args: argparse.Namespace, pipe: Sampler, order: Order, given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides about the pictures, for `samples.jsonl`; batch size and device do not."""
    from vgen.files import sha256

    chosen = {**pipe.settings, **{key: value for key, value in given.items() if value is not None}}
    chosen |= {"order": order.name, "order_options": _order_options(args.order_option), "steps": order.calls}
    if args.low_steps is not None:
        chosen["low_steps"] = args.low_steps
    files = {name: getattr(args, name) for name in ("init_image", "mask") if getattr(args, name)}
    return {
        "model": args.model,
        "weights": pipe.fingerprint(),
        "seed": args.seed,
        **chosen,
        **{name: {"name": path.name, "sha256": sha256(path)} for name, path in files.items()},
        **({"outpaint": args.outpaint, "paste_back": args.paste_back} if args.init_image else {}),
        "dtype": args.dtype or "float32",
        "device": str(pipe.device),
    }


def _destination(args: argparse.Namespace) -> OneFile | SampleFolder:
    prompts = args.prompts
    if prompts is None:
        subjects = [{"class": int(label) if label.isdecimal() else label} for label in args.class_label]
    else:
        subjects = [{"prompt": prompt} for prompt in prompts]
    each = [subject for subject in subjects for _ in range(args.num_images)]
    return destination(args.out, args.first, each, args.overwrite)


def _prompts(args: argparse.Namespace) -> list[str] | None:
    if args.class_label and (args.prompt or args.prompt_file):
        raise VgenError("give prompts or --class-label, not both")
    if args.class_label:
        return None
    if args.prompt and args.prompt_file:
        raise VgenError("give --prompt or --prompt-file, not both")
    if args.prompt_file:
        try:  # not splitlines: it ends lines at form feeds and U+2028 too, which stand in the middle of captions
            lines = re.split(r"\r\n?|\n", read_text(args.prompt_file.read_bytes()))
        except (OSError, BadFile) as error:
            raise VgenError(
                f"the prompt file {args.prompt_file} cannot be read ({error}); give a UTF-8 text file, one prompt a line"
            ) from None
        prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not prompts:
            raise VgenError(f"the prompt file {args.prompt_file} has no prompts; write one a line")
        return prompts
    return list(args.prompt or _default_prompts(args.model))


def _default_prompts(model: str) -> tuple[str, ...]:
    """The examples that the model has the words for; without captions in its training the empty prompt, the only one it knows.

    Reads no weights. VgenError: it has words, but none of the examples."""
    path = Path(model) / "model" / "vocabulary.json"
    if not path.is_file():
        return PROMPTS
    words = {word for word in read_json(path).get("model", {}).get("vocab", {}) if not word.startswith("<")}
    sayable = tuple(prompt for prompt in PROMPTS if words.issuperset(prompt.split()))
    if words and not sayable:
        raise VgenError(
            f"give --prompt TEXT (or --class-label): {model} was not trained with the words of the examples, but with such as "
            f"{', '.join(sorted(words)[:8])}; --list-words prints them all"
        )
    return sayable or ("",)


def _order_options(pairs: list[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise VgenError(f"--order-option takes KEY=VALUE, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options
