"""`python run_tiny.py [--die-in-save STEP] CONFIG …`: `vgen train` that knows the tiny system. Tests start it as a process of its own."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vgen.cli.main import main
from vgen.train import checkpoint
from vgen.train.system import SYSTEMS

SYSTEMS["tiny"] = "train.tiny_system"


def die_in_save(step: int) -> None:
    """Kills this process in the middle of writing the checkpoint of `step`: weights are there, optimizers are not."""
    save = checkpoint.torch.save

    def dying(content, path):
        if f"step_{step:08d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, path)

    checkpoint.torch.save = dying


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--die-in-save":
        die_in_save(int(arguments[1]))
        arguments = arguments[2:]
    sys.exit(main(["train", *arguments]))
