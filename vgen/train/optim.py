"""Optimizers of one network, the learning-rate schedule, and the exponential moving average of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vgen.train.config import OptimizerConfig


def make_optimizers(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all trainable parameters, or Muon (Jordan et al. 2024) over hidden matrices plus AdamW over the rest."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    hidden = _hidden_matrices(network, config) if config.name == "muon" else set()
    rest = {name: p for name, p in named.items() if name not in hidden}
    decayed = {
        name for name, p in rest.items() if p.dim() >= 2 and not any(word in name for word in config.no_decay_names)
    }
    groups = [
        {"params": [p for name, p in rest.items() if name in decayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in rest.items() if name not in decayed], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        groups = [group for group in groups if group["params"]]
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps))
    if hidden:
        matrices = [p for name, p in named.items() if name in hidden]
        # match_rms_adamw scales the orthogonalised update to the size AdamW's has, so one lr serves both.
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _hidden_matrices(network: nn.Module, config: OptimizerConfig) -> set[str]:
    found = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            full = f"{name}.weight" if name else "weight"
            if module.weight.requires_grad and not any(word in full for word in config.adamw_names):
                found.add(full)
    return found


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of `step` (0-based): linear warm-up, then constant, in drops, or a cosine (from `decay_from` on) to `final_lr * lr` at the last of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "multistep":
        return config.lr * config.drop ** sum(step >= mark * steps for mark in config.milestones)
    start = max(config.warmup_steps, config.decay_from * steps)
    progress = min(1.0, max(0.0, step - start) / max(1, steps - 1 - start))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


class Average:
    """Exponential moving average of a network's floating-point parameters, in fp32 and sharded as they are.

    decay(t) = min(decay, (1 + t) / (10 + t)): early averages follow the weights instead of the initialisation.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.sources = {name: p for name, p in network.named_parameters() if p.is_floating_point()}
        self.values: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in self.sources.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves towards the weights after `step` (0-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        sources = [p.detach().float() for p in self.sources.values()]
        torch._foreach_lerp_(list(self.values.values()), sources, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the network holds the averaged weights; afterwards its own again, bit by bit."""
        with torch.no_grad():
            own = {name: p.detach().clone() for name, p in self.sources.items()}
            for name, parameter in self.sources.items():
                parameter.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.sources.items():
                    parameter.copy_(own[name])
