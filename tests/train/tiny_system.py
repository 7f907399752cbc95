"""A system small enough for tests: a regressor with dropout and a critic that judges its outputs, on data made from row numbers."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from vgen.settings import require_share
from vgen.train.config import OptimizerConfig, TrainConfig
from vgen.train.system import Loss


@dataclass(frozen=True)
class Config(TrainConfig):
    dropout: float = 0.2
    noise: float = 0.1
    pause: float = 0.0  # seconds a step takes
    poison: int = 0  # step (from 1) whose loss is not a number; 0: none
    adversarial: bool = True
    critic_from: int = 0  # first step that trains the critic
    signal_from: int = -1  # this process, by rank, gets SIGTERM in step 3; -1: none
    batch_norm: bool = True
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)


def check(config: Config) -> None:
    require_share(config, "dropout")


def build(config: Config, device: torch.device) -> TinySystem:
    return TinySystem(config, device)


class TinySystem:
    averaged = ("regressor",)
    items = "rows"
    score = ("error", -1)

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        norm = nn.BatchNorm1d(16) if config.batch_norm else nn.LayerNorm(16)
        layers = nn.Linear(4, 16), norm, nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(16, 4)
        self.networks: dict[str, nn.Module] = {"regressor": nn.Sequential(*layers)}
        self.optimizers = {"regressor": config.optimizer}
        if config.adversarial:
            self.networks["critic"] = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            self.optimizers["critic"] = config.critic
        self.regressor = self.networks["regressor"]
        self.seen: list[int] = []  # row numbers, in the order in which they were trained on

    def data_digests(self) -> dict[str, str]:
        return {"the rows": "counted"}

    def batches(self, start: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        number, size = start, self.config.batch_size
        while True:
            first = (number * world + rank) * size
            yield {"x": torch.stack([self._row(row) for row in range(first, first + size)]), "row": first}
            number += 1

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        time.sleep(self.config.pause)
        self.seen.append(batch["row"])
        x = batch["x"]
        noise = torch.randn(x.shape, generator=generator)
        made = self.networks["regressor"](x + self.config.noise * noise)
        error = (made.float() - x.flip(-1)).square().mean()
        if step + 1 == self.config.poison:
            error = error * float("nan")
        yield Loss("regressor", error, {"output": made.detach().abs().mean()})
        if (
            step == 2
            and len(self.seen) % self.config.accumulate == 0
            and self.config.signal_from == int(os.environ.get("RANK", "0"))
        ):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.config.adversarial and step >= self.config.critic_from:
            judged = self.networks["critic"](torch.cat((x, made.detach().float())))
            yield Loss(
                "critic", (judged.float() - torch.arange(2.0).repeat_interleave(len(x))[:, None]).square().mean()
            )

    def after_step(self, step: int, generator: Generator, averages: dict[str, dict[str, Tensor]]) -> list[str]:
        return []

    def preview(self, step: int) -> Image.Image:
        torch.rand(3), np.random.rand(3), random.random()  # looking may draw
        return Image.new("RGB", (4, 4))

    def evaluate(self, step: int) -> dict[str, float]:
        torch.rand(3), np.random.rand(3), random.random()
        x = torch.stack([self._row(-1 - row) for row in range(16)])
        return {"error": (self.regressor(x).float() - x.flip(-1)).square().mean().item()}

    def export(self, folder: Path, weights: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> None:
        save_file({key: value.to(dtype) for key, value in weights["regressor"].items()}, folder / "model.safetensors")

    @staticmethod
    def _row(number: int) -> Tensor:
        return torch.sin(torch.arange(1.0, 5.0) * (number + 0.5))
