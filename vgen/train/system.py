"""What can be trained: the System protocol, the table of systems, and how a config becomes one.

A system is a module with `Config` (a frozen dataclass inheriting TrainConfig), `check(config)` (raises VgenError before anything is loaded) and
`build(config, device)` (loads data, makes networks). Adding one is one line in SYSTEMS (vgen/train/config.py); configs name a system, never a class path.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from vgen.settings import merge
from vgen.train.config import SYSTEMS, OptimizerConfig, TrainConfig, check_common, known_system, read_layers
from vgen.train.precision import resolved


@dataclass
class Loss:
    """One objective of a step: the network that minimises it, the scalar, and what else to log (detached scalars)."""

    network: str
    value: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class System(Protocol):
    """Networks, their objectives and their data. The loop owns optimizers, precision, averaging, checkpoints and logs.

    networks: name -> trainable module, one optimizer each. The loop replaces the values by prepared ones (DDP, FSDP2), so `losses` must call
    `self.networks[name](…)` exactly once per objective and backward pass: gradient synchronisation hangs on that forward.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, OptimizerConfig]  # name of a network -> its recipe
    averaged: Sequence[str]  # networks with an exponential moving average
    items: str  # what one row of a batch is, in the plural ("images")
    score: tuple[str, int] | None  # key of `evaluate` that picks the best checkpoint, +1 if more is better, -1 if less

    def data_digests(self) -> Mapping[str, str]:
        """What is learned from and measured on, in words -> its digest: a run continues on the same data only."""

    def batches(self, start: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """Endless batches; batch number b holds the same rows whatever `start` is (b counts forward passes)."""

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        """The objectives of one batch in order; each is back-propagated (and its network updated) before the next is asked for.

        Every random draw comes from `generator`, or from torch's global generator, which is seeded for this step as well.
        """

    def after_step(self, step: int, generator: Generator, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Work between steps (e.g. reviving dead codes), with `averages[network][name]` at hand; returns messages for the user."""

    def preview(self, step: int) -> Image.Image | None:
        """A picture of the present state, drawn with the averaged weights."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures on held-out data, with the averaged weights."""

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        """Writes a model with `save_pretrained`. weights: network -> state dict on the CPU, averaged where there is an average."""


def system_module(name: str) -> ModuleType:
    """The module of a system. Raises VgenError for an unknown name."""
    return importlib.import_module(SYSTEMS[known_system(name)])


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The checked config of a YAML file (a path, or a name of `vgen configs`) and `key=value` overrides: the system's Config."""
    name, *layers = read_layers(path, overrides)
    module = system_module(name)
    config = merge(module.Config, *layers)
    check_common(config)
    module.check(config)
    return config


def build_system(config: TrainConfig, device: torch.device) -> System:
    """The system of a checked config: its data is opened and its networks are made (seed torch first) for `device`."""
    return system_module(config.system).build(resolved(config, device), device)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The config's precision, for calls that do not go through a prepared network."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` with floating-point weights in `dtype`; not diffusers' `to`, which warns about a list that is empty here."""
    return nn.Module.to(model, dtype)


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices spread evenly over `length`."""
    count = min(count, length)
    return [i * length // count for i in range(count)]
