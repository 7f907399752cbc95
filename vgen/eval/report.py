"""What a table of measurements says about the machine that it was made on."""

from __future__ import annotations

import os
import platform

import torch


def machine_line(device: torch.device | str = "cpu") -> str:
    """Device, processor, threads, load and torch version: call it when the measuring is over."""
    return (
        f"{torch.device(device).type}, {platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the end, "
        f"torch {torch.__version__}"
    )
