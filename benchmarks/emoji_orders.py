"""One checkpoint, all orders: quality against forward passes.

For every order (and several step counts) this makes pictures for training captions and reports
  retrieval   share of pictures whose nearest dataset picture is the one that bears the caption
              (Euclidean distance of RGB pixels at the pictures' own size, over all pictures of both splits)
  own tokens  share of tokens equal to those of the caption's own picture
  PSNR        of the made picture against the caption's own, mean in dB (the tokenizer's round trip is the ceiling)
  held-out    cross-entropy in nats per token of the held-out pictures under this order's own mask
  images/s    sampling with guidance, tokens and pixels, all orders in one run on one machine

command:   python benchmarks/emoji_orders.py --data data/emoji --tokens runs/tokens/emoji --out docs/emoji_orders
duration:  about 10 minutes for 200 captions on 2 CPU cores
It writes OUT.md, OUT.json, OUT.png (the same captions in every order) and OUT_curve.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tqdm import tqdm

import vgen
from vgen.cli.arguments import usable_device
from vgen.eval.captions import CaptionTask, ordered_loss
from vgen.eval.report import machine_line
from vgen.files import atomic_path, write_json
from vgen.samplers.orders import make_order
from vgen.viz.curves import scatter
from vgen.viz.sheets import sheet

# (order, step counts; None: the order has no free count). Rows of the table, in this order.
ORDERS = (
    ("raster", (None,)),
    ("diagonal", (None,)),
    ("neighbor", (None,)),
    ("zip-2", (None,)),
    ("zip-4", (None,)),
    ("regions-4", (None,)),
    ("regions-16", (None,)),
    ("blocks-2", (None,)),
    ("blocks-4", (None,)),
    ("hierarchical", (None,)),
    ("random", (1, 2, 4, 8, 16, 32, 64)),
    ("halton", (4, 8, 16, 32)),
    ("locality", (4, 8, 16, 32)),
    ("confidence", (2, 4, 8, 16, 32)),
)


CURVES = {
    "psnr": "PSNR against the caption's own picture, dB",
    "held_out_nats": "held-out nats per token (less is better)",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="shipped model or pipeline folder (default emoji)")
    parser.add_argument("--data", default="data/emoji", help="dataset folder (default data/emoji)")
    parser.add_argument(
        "--tokens", default="runs/tokens/emoji", help="token folder of `vgen tokenize`, for the held-out loss"
    )
    parser.add_argument("--captions", type=int, default=200, help="training captions (default 200, drawn with seed 0)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default=None)
    parser.add_argument("--guidance-scale", type=float, default=None, help="default: the model's")
    parser.add_argument("--temperature", type=float, default=None, help="default: the model's")
    parser.add_argument("--curve", choices=CURVES, default="psnr", help="y axis of OUT_curve.png (default psnr)")
    parser.add_argument("--only", action="append", help="run only these orders")
    parser.add_argument("--out", type=Path, default=Path("docs/emoji_orders"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    pipe = vgen.load(args.model, device=usable_device(args.device))
    size = pipe.tokenizer.spec.pixels(pipe.model.grid)[1]
    task = CaptionTask.draw(args.data, args.tokens, size, args.captions)
    settings = {"guidance_scale": args.guidance_scale, "temperature": args.temperature}

    runs = [(name, steps) for name, counts in ORDERS for steps in counts if not args.only or name in args.only]
    rows, samples = [], {}
    for name, steps in tqdm(runs, desc="orders", unit="run"):
        order = make_order(name, pipe.model.grid, **({"steps": steps} if steps else {}))
        start = time.perf_counter()
        result = pipe(task.prompts, order=order, batch_size=args.batch_size, seed=0, **settings)
        seconds = time.perf_counter() - start
        label = f"{name}, {steps} step{'s' * (steps > 1)}" if steps else name
        rows.append(
            {
                "order": label,
                "calls": order.calls,
                "rows_per_call": result.stats.call_rows / result.stats.calls / args.batch_size,
                "fed_tokens_per_image": result.stats.fed_tokens / len(task.prompts),
                "images_per_second": len(task.prompts) / seconds,
                "held_out_nats": task.held_out_loss(pipe, ordered_loss(pipe, order)),
                **task.figures(result),
            }
        )
        samples[label] = result.images[:12]
        tqdm.write(json.dumps(rows[-1]))
    report(args, pipe, rows, samples, task.prompts)


def report(args: argparse.Namespace, pipe, rows: list[dict], samples: dict, prompts: list[str]) -> None:
    machine = machine_line(pipe.device)
    lines = [
        f"{args.captions} training captions, guidance {args.guidance_scale or pipe.config.guidance_scale} "
        f"({pipe.config.guidance_schedule}), temperature {args.temperature or pipe.config.temperature}, seed 0; machine: {machine}.",
        "",
        "| order | calls | tokens fed per image | images/s | retrieval | own tokens | PSNR, dB | held-out nats/token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['order']} | {r['calls']} | {r['fed_tokens_per_image']:.0f} | {r['images_per_second']:.1f} | {100 * r['retrieval']:.1f} % "
        f"| {100 * r['own_tokens']:.1f} % | {r['psnr']:.1f} | {r['held_out_nats']:.2f} |"
        for r in rows
    ]
    with atomic_path(args.out.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(args.out.with_suffix(".json"), {"machine": machine, "rows": rows})
    pictures = [image for images in samples.values() for image in images]
    labels = [f"{label}" if i == 0 else prompts[i] for label, images in samples.items() for i in range(len(images))]
    with atomic_path(args.out.with_suffix(".png")) as temporary:
        sheet(pictures, labels, columns=12).save(temporary)
    points = [(r["calls"], r[args.curve], r["order"]) for r in rows]
    with atomic_path(args.out.with_name(args.out.name + "_curve.png")) as temporary:
        scatter(points, "forward passes", CURVES[args.curve], "One checkpoint, all orders").save(temporary)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
