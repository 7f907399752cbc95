"""Logs of a run: log.jsonl always, TensorBoard where installed, a progress bar or plain lines for the reader."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from vgen.files import atomic_path


class RunLog:
    """Writes the figures of a run. On processes other than the main one it is silent.

    A run that restarts at `step` first drops the log's later lines, so that every step appears once, and damaged ones.
    """

    def __init__(self, folder: Path, step: int, steps: int, items: str, tensorboard: bool, active: bool):
        self.active, self.steps, self.items = active, steps, items
        self.started, self.first = time.monotonic(), step
        self.board = None
        if not active:
            return
        self.path = folder / "log.jsonl"
        _drop_after(self.path, step)
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        # On a terminal a bar; in a file or pipe, where a bar is unreadable, one line per log entry.
        self.bar = tqdm(initial=step, total=steps, unit="step", dynamic_ncols=True, disable=None, file=sys.stderr)

    def advance(self) -> None:
        """One more step is done."""
        if self.active:
            self.bar.update()

    def figures(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Records `values` after `step` steps under `kind` (train, held_out)."""
        if not self.active:
            return
        entry = {"kind": kind, "step": step, **{key: float(f"{value:.6g}") for key, value in values.items()}}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.board:
            for key, value in values.items():
                self.board.add_scalar(f"{kind}/{key}", value, step)
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        if kind == "train" and not self.bar.disable:
            rate = values.get(f"{self.items}_per_second", 0.0)
            self.bar.set_postfix_str(f"loss {values.get('loss', float('nan')):.4g}, {rate:.0f} {self.items}/s")
        else:
            self.say(f"step {step}/{self.steps}  {'' if kind == 'train' else kind + '  '}{text}{self._remaining(step)}")

    def say(self, message: str) -> None:
        """One line for the reader, above the bar."""
        if self.active:
            tqdm.write(message, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard."""
        if self.active:
            self.bar.close()
            if self.board:
                self.board.close()

    def _remaining(self, step: int) -> str:
        done = step - self.first
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self.started) / done * (self.steps - step)
        return f"  ETA {seconds / 60:.0f} min" if seconds >= 90 else f"  ETA {seconds:.0f} s"


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(line + b"\n" for line in content.split(b"\n") if _step_of(line) <= step)
    if kept != content:
        with atomic_path(path) as temporary:
            temporary.write_bytes(kept)


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for one that a kill or a full disk damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
    return step if isinstance(step, int) else math.inf
