"""Which precision a machine trains fastest in: bf16 autocast where the hardware multiplies bf16, else fp32.

On a CPU without such instructions torch emulates them: training was 2.4 to 3.2 times slower than in fp32 (measured on the emoji configs).
"""

from __future__ import annotations

import dataclasses
import platform

import torch

from vgen.settings import C

MIXED = {"fp32": "no", "bf16": "bf16"}  # precision of a config -> accelerate's name
SLOWER = "on a CPU without them bf16 was 2.4 to 3.2 times slower than fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bf16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # Arm; on x86 it is also true where torch emulates


def bf16_reason(device: torch.device) -> str:
    """Half a sentence about `has_bf16`."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"
    return f"{what} has {'' if has_bf16(device) else 'no '}bf16 instructions"


def resolved(config: C, device: torch.device) -> C:
    """`config` (a TrainConfig) with fp32 or bf16 in the place of precision=auto."""
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision="bf16" if has_bf16(device) else "fp32")
