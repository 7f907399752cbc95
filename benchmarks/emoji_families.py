"""One tokenizer, equal training compute: the native model beside LlamaGen (raster and ZipAR), PAR, NAR, DAR and RAR.

Trains what is not trained yet (configs/emoji/*.yaml of the table CONFIGS; resumable), then samples every model in its own
orders and reports
  training    floating-point operations of the whole training, counted by torch (forward of the loss x 3 x pictures seen)
  calls       forward passes a batch, and tokens fed a picture
  images/s    with guidance, tokens and pixels; all rows in one run on one machine
  held-out    cross-entropy in nats per token of the held-out pictures with their captions, under the model's own factorisation;
              best: the lowest that the run's log has (with averaged weights, over its own training objective), and its step
  retrieval   share of pictures whose nearest dataset picture is the one that bears the caption; own tokens, PSNR: as in docs/emoji.md.
              Sampled at temperature 1, and greedy (temperature 0): models that know their pictures by heart lose the thread after
              one unlikely token, and greedy decoding shows what they know

command:   python benchmarks/emoji_families.py --out docs/emoji_families        (--no-train: only measure)
duration:  an hour of training and five minutes of sampling on 2 CPU cores
It writes OUT.md, OUT.json, OUT.png and OUT_greedy.png (the same captions by every model).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import vgen
from vgen.cli.arguments import usable_device
from vgen.eval.captions import CaptionTask, ordered_loss
from vgen.eval.report import machine_line
from vgen.files import atomic_path, write_json
from vgen.pipelines.visual import VisualPipeline
from vgen.samplers.orders import make_order
from vgen.samplers.types import Condition
from vgen.train.loop import train
from vgen.train.system import load_config
from vgen.viz.sheets import sheet

# name: (config, orders that it is sampled in; None: its own)
CONFIGS: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "native any-order": (
        "anyorder_small",
        ("raster", "neighbor", "regions-4", "zip-3", "random:steps=8", "locality:steps=16", "confidence:steps=16"),
    ),
    "LlamaGen": ("llamagen", (None,)),
    "LlamaGen + ZipAR": (
        "llamagen",
        ("zip-1", "zip-2", "zip-3", "zip-4", "zip:window=3,faithful=true", "zip:window=1,adaptive=true"),
    ),
    "PAR-4x": ("par", (None,)),
    "NAR": ("nar", (None,)),
    "DAR": ("dar", (None,)),
    "RAR": ("rar", (None,)),
}
FOLDER = Path("configs/emoji")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/emoji", help="dataset folder (default data/emoji)")
    parser.add_argument("--tokens", default="runs/tokens/emoji", help="token folder of `vgen tokenize`")
    parser.add_argument("--captions", type=int, default=200, help="training captions (default 200, drawn with seed 0)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default=None)
    parser.add_argument("--no-train", action="store_true", help="measure models that are trained already")
    parser.add_argument("--only", action="append", choices=CONFIGS, help="only these rows")
    parser.add_argument("--out", type=Path, default=Path("docs/emoji_families"))
    return parser.parse_args()


def training_flops(pipe: VisualPipeline, config, task: CaptionTask) -> float:
    """Floating-point operations of the run: a backward pass costs twice the forward pass."""
    condition, tokens = next(task.held_out_batches(pipe, chunk=1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        own_loss(pipe)(condition, tokens, 0)
    return 3.0 * counter.get_total_flops() * config.steps * config.batch_size * config.accumulate


def best_held_out(out: str) -> tuple[float, int]:
    """The lowest held-out cross-entropy in a run's log, and its step."""
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "held_out"]
    return min((record["cross_entropy"], record["step"]) for record in records)


def own_loss(pipe: VisualPipeline, order=None) -> Callable[[Condition, Tensor, int], Tensor]:
    """A model's cross-entropy: under an order where it takes any, else under its own."""
    if hasattr(pipe.model, "queries"):
        return ordered_loss(pipe, order or make_order("raster", pipe.model.grid))
    return lambda condition, tokens, first: pipe.model.loss(condition, tokens)["loss"]


def measure(name: str, pipe: VisualPipeline, order_name: str | None, config, task: CaptionTask, batch: int):
    """One row, and twelve pictures each, sampled and greedy."""
    order = make_order(order_name, pipe.model.grid) if order_name else pipe.model.default_order()
    batch = 1 if "adaptive" in order.name else batch  # it decides per picture
    pipe(task.prompts[:batch], order=order, batch_size=batch, seed=1)  # warm-up
    start = time.perf_counter()
    result = pipe(task.prompts, order=order, batch_size=batch, seed=0)
    seconds = time.perf_counter() - start
    greedy = pipe(task.prompts, order=order, batch_size=batch, seed=0, temperature=0.0)
    # LlamaGen was trained in raster order: under ZipAR it has no likelihood of its own.
    likelihood = name != "LlamaGen + ZipAR" and not order.name.startswith("confidence")
    row = {
        "model": name,
        "order": order.name,
        "parameters": sum(p.numel() for p in pipe.model.parameters()),
        "training_flops": training_flops(pipe, config, task),
        "calls": result.stats.calls / result.stats.batches,
        "fed_tokens_per_image": result.stats.fed_tokens / len(task.prompts),
        "batch": batch,
        "images_per_second": len(task.prompts) / seconds,
        "held_out_nats": task.held_out_loss(pipe, own_loss(pipe, order)) if likelihood else None,
        "best_held_out": best_held_out(config.out),
        **task.figures(result),
        **{f"{name}_greedy": value for name, value in task.figures(greedy).items()},
    }
    return row, (result.images[:12], greedy.images[:12])


def main() -> None:
    args = arguments()
    chosen = {name: CONFIGS[name] for name in args.only or CONFIGS}
    configs = {file: load_config(FOLDER / f"{file}.yaml") for file, _ in chosen.values()}
    for config in configs.values():
        if not args.no_train:
            train(config)
    pipes = {
        file: vgen.load(Path(config.out) / "model", device=usable_device(args.device))
        for file, config in configs.items()
    }
    first = next(iter(pipes.values()))
    size = first.tokenizer.spec.pixels(first.model.grid)[1]
    task = CaptionTask.draw(args.data, args.tokens, size, args.captions)
    rows, samples = [], {}
    runs = [(name, file, order) for name, (file, orders) in chosen.items() for order in orders]
    for name, file, order in tqdm(runs, desc="rows", unit="row"):
        row, images = measure(name, pipes[file], order, configs[file], task, args.batch_size)
        rows.append(row)
        samples[f"{name}: {row['order']}"] = images
        tqdm.write(json.dumps(row))
    report(args, first, rows, samples, task)


def report(args: argparse.Namespace, pipe: VisualPipeline, rows: list[dict], samples: dict, task: CaptionTask) -> None:
    machine = machine_line(pipe.device)
    lines = [
        f"{len(task.prompts)} training captions, guidance {pipe.config.guidance_scale}, temperature {pipe.config.temperature}, "
        f"seed 0, batches of {args.batch_size}; machine: {machine}.",
        "",
        "| model | order | parameters | training, TFLOP | calls | tokens fed per image | images/s | held-out nats/token | best (step) | retrieval | own tokens | PSNR, dB | greedy: retrieval | own tokens | PSNR, dB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        best, step = r["best_held_out"]
        nats = "–" if r["held_out_nats"] is None else f"{r['held_out_nats']:.2f}"
        alone = "" if r["batch"] == args.batch_size else f" (batch {r['batch']})"
        lines.append(
            f"| {r['model']} | {r['order']} | {r['parameters'] / 1e6:.1f} M | {r['training_flops'] / 1e12:.1f} | {r['calls']:.0f} "
            f"| {r['fed_tokens_per_image']:.0f} | {r['images_per_second']:.1f}{alone} | {nats} | {best:.2f} ({step}) | {100 * r['retrieval']:.1f} % "
            f"| {100 * r['own_tokens']:.1f} % | {r['psnr']:.1f} | {100 * r['retrieval_greedy']:.1f} % "
            f"| {100 * r['own_tokens_greedy']:.1f} % | {r['psnr_greedy']:.1f} |"
        )
    with atomic_path(args.out.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(args.out.with_suffix(".json"), {"machine": machine, "rows": rows})
    for which, suffix in enumerate(("", "_greedy")):
        pictures = [image for pair in samples.values() for image in pair[which]]
        labels = [
            label if i == 0 else task.prompts[i] for label, pair in samples.items() for i in range(len(pair[which]))
        ]
        with atomic_path(args.out.with_name(f"{args.out.name}{suffix}.png")) as temporary:
            sheet(pictures, labels, columns=12).save(temporary)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
