"""Whether looking at a training (checkpoint, evaluate, preview, log, export) changes anything that training reads."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vgen.train.log import RunLog
from vgen.train.loop import Trainer


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """Every weight, buffer, average, gradient, optimizer state, mode, global generator and switch, as comparable values."""
    found: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "switches": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
    }
    for name, trainee in trainer.trainees.items():
        for key, value in trainee.network.state_dict().items():
            found[f"{name}/{key}"] = value.numpy().tobytes()
        for key, value in trainee.network.named_parameters():
            found[f"{name}/{key}/grad"] = (value.requires_grad, value.grad is None)
        for key, module in trainee.network.named_modules():
            found[f"{name}/{key}/mode"] = module.training
        for number, optimizer in enumerate(trainee.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    found[f"{name}/optimizer {number}/{index}/{key}"] = value.numpy().tobytes()
        if trainee.average:
            found |= {f"{name}/{key}/average": v.numpy().tobytes() for key, v in trainee.average.values.items()}
    return found


def changed_by_looking(trainer: Trainer, folder: Path, steps: int) -> list[str]:
    """What looking after 0, 1, … `steps` steps changed: "step 2, save: names", nothing for a neutral trainer."""
    folder.mkdir()
    log = RunLog(folder, 0, 10, "rows", tensorboard=False, active=True)
    batches, changed = trainer.system.batches(0, 0, 1), []
    frozen = next(
        module for module in trainer.trainees[trainer.leading].network.modules() if not list(module.children())
    )
    frozen.eval()  # a part that stays in evaluation mode, as frozen ones do
    for step in range(steps + 1):
        before = snapshot(trainer)
        actions = {
            "evaluate": lambda step=step: trainer.evaluate(step, log),
            "preview": lambda step=step: trainer.preview(step),
            "log": lambda step=step: log.figures(step, trainer.watch.collect(None)),
            "save": lambda step=step: trainer.save(step, None),
            "export": lambda step=step: trainer.export(folder / f"model {step}"),
        }
        for name, act in actions.items():
            act()
            after = snapshot(trainer)
            differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
            changed += [f"step {step}, {name}: {', '.join(differing)}"] if differing else []
        if step < steps:
            trainer.step(step, batches)
    log.close()
    return changed
