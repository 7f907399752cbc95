"""All shipped tokenizers on the held-out emoji: quality against tokens and bits.

For every tokenizer (and every number of kept tokens of a flexible one) it reports PSNR and SSIM over the held-out and as many training
pictures, tokens and bits a picture, and the time to code and decode one. Continuous tokenizers appear once more for every number of
bits of BITS, quantised after training (TokenBridge).

command:   python benchmarks/emoji_tokenizers.py --model emoji-vq --model emoji-titok --model runs/emoji/flextok/model --model emoji-kl
           (without --model: all shipped tokenizers)
duration:  ten minutes on 2 CPU cores, most of it the flow decoder
It writes OUT.md, OUT.json, OUT.png (held-out pictures over what every tokenizer makes of them) and OUT_curve.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from diffusers import ModelMixin
from tqdm import tqdm

import vgen
from vgen.cli.reconstruct import load_pictures
from vgen.eval.reconstruction import cost, joined, reconstruct_batches
from vgen.eval.report import machine_line
from vgen.files import atomic_path, write_json
from vgen.layers.pixels import to_images
from vgen.tokenizers_vis.flextok.flextok import FlexTok, token_counts
from vgen.tokenizers_vis.registry import SHIPPED
from vgen.tokenizers_vis.tokenbridge import TokenBridge
from vgen.train.system import spread
from vgen.viz.curves import scatter
from vgen.viz.sheets import sheet

BITS = (2, 3, 4, 6)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="dataset folder (default data/emoji)")
    parser.add_argument(
        "--model", action="append", help="shipped, published or folder; repeatable (default: all shipped)"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument(
        "--pictures", type=int, default=0, help="of every split, spread over it (default: all held-out ones)"
    )
    parser.add_argument("--steps", type=int, help="substeps of generative decoders (default: the tokenizer's)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shown", type=int, default=10, help="pictures on the sheet")
    parser.add_argument("--out", type=Path, default=Path("docs/emoji_tokenizers"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    held_out = load_pictures(args.data, "heldout", args.size)
    held_out = held_out[spread(len(held_out), args.pictures or len(held_out))]
    train = load_pictures(args.data, "train", args.size)
    train = train[spread(len(train), len(held_out))]
    shown = spread(len(held_out), args.shown)
    rows, pictures, labels = [], to_images(held_out[shown]), ["original"] * args.shown
    runs = [run for name in args.model or SHIPPED for run in variants(name)]
    for name, tokenizer, kept in tqdm(runs, desc="tokenizers", unit="run"):
        settings = {"steps": args.steps if isinstance(tokenizer, FlexTok) else None, "batch_size": args.batch_size}
        start = time.perf_counter()
        result = joined(list(reconstruct_batches(tokenizer, held_out, kept, **settings)))
        seconds = time.perf_counter() - start
        known = joined(list(reconstruct_batches(tokenizer, train, kept, **settings)))
        price = cost(tokenizer.spec, args.size, args.size, kept)
        rows.append(
            {
                "tokenizer": name,
                "parameters": sum(p.numel() for p in tokenizer.parameters()),
                "tokens": price.tokens,
                "bits": price.bits,
                "bits_per_pixel": price.bits_per_pixel,
                "compression": price.compression,
                **result.means(),
                **{f"{figure}_train": value for figure, value in known.means().items()},
                "images_per_second": len(held_out) / seconds,
            }
        )
        pictures += to_images(result.reconstruction[shown])
        labels += [
            f"{name}, {price.tokens} tokens" if i == 0 else f"{value:.1f} dB"
            for i, value in enumerate(result.figures["psnr"][shown].tolist())
        ]
        tqdm.write(json.dumps(rows[-1]))
    report(args, rows, len(held_out))
    with atomic_path(args.out.with_suffix(".png")) as temporary:
        sheet(pictures, labels, columns=args.shown, scale=max(1, 96 // args.size)).save(temporary)
    points = [(row["bits"], row["psnr"], f"{row['tokenizer']}, {row['tokens']}") for row in rows]
    with atomic_path(args.out.with_name(args.out.name + "_curve.png")) as temporary:
        scatter(points, "bits a picture", "held-out PSNR, dB", "Tokenizers: quality against bits").save(temporary)


def variants(name: str) -> Iterator[tuple[str, ModelMixin, int | None]]:
    """(label, tokenizer, kept tokens): a tokenizer, with fewer tokens where it can, quantised where it is continuous."""
    tokenizer = vgen.load_tokenizer(name)
    name = Path(name).parent.name if Path(name).is_dir() else name  # runs/emoji/flextok/model -> flextok
    for kept in token_counts(tokenizer.config.registers)[:-1] if isinstance(tokenizer, FlexTok) else ():
        yield name, tokenizer, kept
    yield name, tokenizer, None
    if tokenizer.spec.vocabulary is None and tokenizer.spec.levels is None:
        for bits in BITS:
            yield f"{name} + TokenBridge, {bits} bits", TokenBridge.quantize(tokenizer, bits=bits), None


def report(args: argparse.Namespace, rows: list[dict], count: int) -> None:
    machine = machine_line()
    lines = [
        f"{count} held-out pictures of {args.size} px, and as many training pictures; fp32; flow decoders with {args.steps or 'their own number of'} steps; machine: {machine}.",
        "",
        "| tokenizer | parameters | tokens | bits a picture | bits/pixel | raw / coded | held-out PSNR, dB | held-out SSIM | training PSNR, dB | images/s there and back |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['tokenizer']} | {r['parameters'] / 1e6:.1f} M | {r['tokens']} | {r['bits']:.0f} | {r['bits_per_pixel']:.3f} | {r['compression']:.0f} "
        f"| {r['psnr']:.2f} | {r['ssim']:.3f} | {r['psnr_train']:.2f} | {r['images_per_second']:.1f} |"
        for r in rows
    ]
    with atomic_path(args.out.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(args.out.with_suffix(".json"), {"machine": machine, "rows": rows})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
