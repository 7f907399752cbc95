"""Continuous tokens, equal training compute: MAR with three heads, Hi-MAR, xAR and TokenBridge on the latents of one tokenizer.

Trains what is not trained yet (configs/emoji/*.yaml of the table ROWS; resumable), then samples every model with several settings
and reports
  training    floating-point operations of the whole training, counted by torch over forward and backward passes of the loss
  calls       passes of the backbone a batch; substeps: of a token's head, or of an entity's flow
  images/s    with guidance, latents and pixels; all rows in one run on one machine
  tokens, pairs   Fréchet distance of single latents, and of latents with their right-hand neighbours, from those of the captions'
              own pictures: is a token one that occurs (0: as in the data), and does it fit the one beside it
  retrieval   share of pictures whose nearest dataset picture is the one that bears the caption; PSNR: against that picture, in dB. Both
              like blur: the mean of all pictures that a caption might mean is nearer to each of them than they are to each other

The losses of these families measure different things and are not compared.

command:   python benchmarks/emoji_continuous.py --out docs/emoji_continuous        (--no-train: only measure)
duration:  two hours of training on 2 CPU cores, ten minutes of sampling
It writes OUT.md, OUT.json and OUT.png (the same captions in every row).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import vgen
from vgen.cli.arguments import usable_device
from vgen.eval.captions import CaptionTask
from vgen.eval.frechet import frechet_distance, pair_rows, token_rows
from vgen.eval.report import machine_line
from vgen.files import atomic_path, write_json
from vgen.pipelines.visual import VisualPipeline
from vgen.samplers.types import Canvas
from vgen.train.loop import train
from vgen.train.system import build_system, load_config
from vgen.viz.sheets import sheet


@dataclass(frozen=True)
class Row:
    """A model with the settings of a call. name: of the model; config: in configs/emoji; substeps: as the table says them."""

    name: str
    config: str
    substeps: str
    settings: dict[str, Any] = field(default_factory=dict)


RANDOM = "random:steps={},schedule=mar"
ROWS = (
    Row("MAR, diffusion", "mar", "100", {"order": RANDOM.format(64), "substeps": 100}),
    Row("MAR, diffusion", "mar", "100", {"order": RANDOM.format(16), "substeps": 100}),
    Row("MAR, diffusion", "mar", "25", {"order": RANDOM.format(16), "substeps": 25}),
    Row("MAR, flow", "mar_flow", "50", {"order": RANDOM.format(16), "substeps": 50}),
    Row("MAR, flow", "mar_flow", "8", {"order": RANDOM.format(16), "substeps": 8}),
    Row("MAR, flow", "mar_flow", "2", {"order": RANDOM.format(16), "substeps": 2}),
    Row("MAR, flow", "mar_flow", "1", {"order": RANDOM.format(16), "substeps": 1}),
    Row("MAR, mean flow", "mar_mean_flow", "8", {"order": RANDOM.format(16), "substeps": 8}),
    Row("MAR, mean flow", "mar_mean_flow", "2", {"order": RANDOM.format(16), "substeps": 2}),
    Row("MAR, mean flow", "mar_mean_flow", "1", {"order": RANDOM.format(16), "substeps": 1}),
    Row("Hi-MAR", "himar", "50, then 50", {"low_substeps": 50, "substeps": 50}),
    Row("xAR", "xar", "50", {"substeps": 50}),
    Row("xAR", "xar", "10", {"substeps": 10}),
    Row("TokenBridge", "tokenbridge", "16 channels", {"order": RANDOM.format(64)}),
    Row("TokenBridge", "tokenbridge", "16 channels", {"order": RANDOM.format(16)}),
    Row("TokenBridge, greedy", "tokenbridge", "16 channels", {"order": RANDOM.format(16), "temperature": 0.0}),
)
FOLDER = Path("configs/emoji")
SCALE = 2.0  # guidance of every row, along the schedule of its model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/emoji", help="dataset folder (default data/emoji)")
    parser.add_argument("--tokens", default="runs/tokens/emoji_kl", help="token folder of `vgen tokenize`")
    parser.add_argument("--captions", type=int, default=100, help="training captions (default 100, drawn with seed 0)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default=None)
    parser.add_argument("--no-train", action="store_true", help="measure models that are trained already")
    parser.add_argument("--only", action="append", choices=sorted({row.config for row in ROWS}), help="only these rows")
    parser.add_argument("--out", type=Path, default=Path("docs/emoji_continuous"))
    return parser.parse_args()


def training_flops(config: Any) -> float:
    """Floating-point operations of the run: a forward and a backward pass of one batch, times the number of batches.

    The share of masked tokens is drawn for every batch: the mean of eight.
    """
    system, total, counted = build_system(config, torch.device("cpu")), 0, 8
    batches = system.batches(0, 0, 1)
    for step in range(counted):
        generator = torch.Generator().manual_seed(step)
        with FlopCounterMode(display=False) as counter:
            for loss in system.losses(next(batches), step, generator):
                loss.value.backward()
        total += counter.get_total_flops()
    return total / counted * config.steps * config.accumulate


def measure(row: Row, pipe: VisualPipeline, task: CaptionTask, batch: int) -> tuple[dict[str, Any], list[Image.Image]]:
    """Figures of one row, and twelve pictures."""
    settings = {"guidance_scale": SCALE, **row.settings}
    pipe(task.prompts[:2], batch_size=2, seed=1, **settings)  # warm-up
    start = time.perf_counter()
    result = pipe(task.prompts, batch_size=batch, seed=0, **settings)
    seconds = time.perf_counter() - start
    figures = {
        "model": row.name,
        "settings": row.settings,
        "substeps": row.substeps,
        "parameters": sum(p.numel() for p in pipe.model.parameters()),
        "calls": result.stats.calls / result.stats.batches,
        "images_per_second": len(task.prompts) / seconds,
        **task.figures(result),
        **fidelity(pipe, result.tokens, task.tokens),
    }
    return figures, result.images[:12]


def fidelity(pipe: VisualPipeline, tokens: Tensor, own: Tensor) -> dict[str, float]:
    """Fréchet distances from the latents `own` [M, N, C]. tokens: of all levels; levels of channels are read as latents."""
    finest = Canvas(pipe.grids, tokens).part(-1).values if len(pipe.grids) > 1 else tokens
    latents = finest if finest.is_floating_point() else pipe.tokenizer.latents(finest)
    latents, grid = latents.cpu(), pipe.model.grid
    return {
        "token_distance": frechet_distance(token_rows(latents), token_rows(own)),
        "pair_distance": frechet_distance(pair_rows(latents, grid), pair_rows(own, grid)),
    }


def main() -> None:
    args = arguments()
    chosen = [row for row in ROWS if args.only is None or row.config in args.only]
    configs = {row.config: load_config(FOLDER / f"{row.config}.yaml") for row in chosen}
    for config in configs.values():
        if not args.no_train:
            train(config)
    flops = {name: training_flops(config) for name, config in configs.items()}
    pipes = {
        name: vgen.load(Path(config.out) / "model", device=usable_device(args.device))
        for name, config in configs.items()
    }
    first = next(iter(pipes.values()))
    size = first.tokenizer.spec.pixels(first.model.grid)[1]
    task = CaptionTask.draw(args.data, args.tokens, size, args.captions)
    rows, samples = [], []
    for row in tqdm(chosen, desc="rows", unit="row"):
        figures, images = measure(row, pipes[row.config], task, args.batch_size)
        rows.append({**figures, "training_flops": flops[row.config]})
        samples.append(images)
        tqdm.write(json.dumps(rows[-1]))
    report(args, first, rows, samples, task)


def report(
    args: argparse.Namespace,
    pipe: VisualPipeline,
    rows: list[dict],
    samples: list[list[Image.Image]],
    task: CaptionTask,
) -> None:
    machine = machine_line(pipe.device)
    lines = [
        f"{len(task.prompts)} training captions, guidance {SCALE:g}, seed 0, batches of {args.batch_size}; "
        f"machine: {machine}.",
        "",
        "| model | parameters | training, TFLOP | calls | substeps | images/s | tokens | pairs | retrieval | PSNR, dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['parameters'] / 1e6:.1f} M | {r['training_flops'] / 1e12:.1f} | {r['calls']:.0f} | {r['substeps']} "
        f"| {r['images_per_second']:.1f} | {r['token_distance']:.2f} | {r['pair_distance']:.2f} | {100 * r['retrieval']:.1f} % | {r['psnr']:.1f} |"
        for r in rows
    ]
    with atomic_path(args.out.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(args.out.with_suffix(".json"), {"machine": machine, "rows": rows})
    pictures = [image for images in samples for image in images]
    labels = [
        f"{row['model']}: {row['calls']:.0f} x {row['substeps']}" if i == 0 else task.prompts[i]
        for row, images in zip(rows, samples)
        for i in range(len(images))
    ]
    with atomic_path(args.out.with_suffix(".png")) as temporary:
        sheet(pictures, labels, columns=12).save(temporary)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
