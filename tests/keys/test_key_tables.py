"""Published checkpoints, by their recorded keys and shapes: each size, built on the meta device, has exactly those."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vgen.tokenizers_vis.patchgan import PatchDiscriminator
from vgen.tokenizers_vis.vq import VQModel

HERE = Path(__file__).parent
SHARED = HERE.parents[1].parent / "shared" / "keys"
FOLDER = Path(os.environ.get("VGEN_KEYS_DIR") or (SHARED if SHARED.is_dir() else HERE / "tables"))

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llamagen-vq16": lambda: VQModel.of_size("vq-16"),
    "llamagen-vq8": lambda: VQModel.of_size("vq-8"),
    "llamagen-patchgan": PatchDiscriminator,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_keys_and_shapes(name: str):
    table = json.loads((FOLDER / f"{name}.json").read_text())
    with torch.device("meta"):
        module = BUILDERS[name]()
    found = {key: list(value.shape) for key, value in module.state_dict().items()}
    assert found == table["state_dict"]
    assert sum(p.numel() for p in module.parameters()) == table["config"]["num_parameters"]
