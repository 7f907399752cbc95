"""Published checkpoints, by their recorded keys and shapes: each size, built on the meta device, has exactly those."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vgen.models.llamagen import LlamaGenModel
from vgen.models.nar import NARModel
from vgen.models.par import PARModel
from vgen.models.rar import SIZES as RAR_SIZES
from vgen.models.rar import RARModel, size_config
from vgen.tokenizers_vis.maskgit_vqgan import MaskGITVQGAN
from vgen.tokenizers_vis.patchgan import PatchDiscriminator
from vgen.tokenizers_vis.vq import VQModel

HERE = Path(__file__).parent
SHARED = HERE.parents[1].parent / "shared" / "keys"
FOLDER = Path(os.environ.get("VGEN_KEYS_DIR") or (SHARED if SHARED.is_dir() else HERE / "tables"))

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llamagen-vq16": lambda: VQModel.of_size("vq-16"),
    "llamagen-vq8": lambda: VQModel.of_size("vq-8"),
    "llamagen-patchgan": PatchDiscriminator,
    "titok-maskgit_vqgan_f16_1024": MaskGITVQGAN,
    **{f"rar-{size.lower()}": (lambda size=size: RARModel(**size_config(size))) for size in RAR_SIZES},
    **{
        f"llamagen-{kind}-{size}": (lambda size=size: LlamaGenModel.of_size(size))
        for kind, sizes in (("c2i", ("B", "L", "XL", "XXL", "3B")), ("unreleased", ("1B", "7B", "XXXL")))
        for size in sizes
    },
    "llamagen-t2i-XL": lambda: LlamaGenModel.of_size("XL", conditioning="text"),
    **{
        f"par-{size}": (lambda size=size: PARModel.of_size(size))
        for size in ("L-4x", "XL-4x", "XXL-4x", "3B-4x", "XXL-16x", "3B-16x")
    },
    **{f"nar-{size}-c2i-256": (lambda size=size: NARModel.of_size(size)) for size in ("B", "M", "L", "XL", "XXL")},
    "nar-XL-t2i-256": lambda: NARModel.of_size("XL", conditioning="text"),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_keys_and_shapes(name: str):
    table = json.loads((FOLDER / f"{name}.json").read_text())
    with torch.device("meta"):
        module = BUILDERS[name]()
    found = {key: list(value.shape) for key, value in module.state_dict().items()}
    assert found == table["state_dict"]
    expected = table.get("params") or table["config"]["num_parameters"]
    assert sum(p.numel() for p in module.parameters()) == expected
