"""Chameleon's VQGAN (arXiv 2405.09818; Lumina-mGPT decodes through it): a taming VQGAN with attention in the middle only.

Its sequence models know a code as a word of their text vocabulary: `image_token_ids` reads which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401 - must be a name of this module: saved pipelines look for it here
from torch import Tensor

from vgen.errors import VgenError
from vgen.tokenizers_vis.taming_vqgan import TamingVQGAN

# Keyword arguments of ChameleonVQGAN. 512: widths of the release's default config (the original vqgan.yaml was not seen).
# emoji-f8: ours, for 64-px pictures on CPUs.
SIZES: dict[str, dict[str, Any]] = {
    "512": {},  # 68.7 M
    "emoji-f8": {
        "ch": 32,
        "ch_mult": (1, 2, 2, 4),
        "num_res_blocks": 1,
        "z_channels": 64,
        "n_embed": 1024,
        "embed_dim": 64,
        "num_groups": 16,
    },
}
WEIGHTS, WORDS = "vqgan.ckpt", "text_tokenizer.json"  # files of Meta's release


class ChameleonVQGAN(TamingVQGAN):
    """`TamingVQGAN` with attention in the middle only, of the widths of Chameleon's release."""

    SIZES = SIZES

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Path | Mapping[str, Any] | None = "512"
    ) -> ChameleonVQGAN:
        """A model from vqgan.ckpt (or the folder of Meta's release that holds it), or from its state dict.

        config: as `TamingVQGAN.from_original`. Raises VgenError when the file is no such checkpoint or its shapes do not fit the config.
        """
        if not isinstance(source, Mapping) and Path(source).is_dir():
            source = Path(source) / WEIGHTS
        return super().from_original(source, config)

    from_single_file = from_original


def image_token_ids(path: str | Path, codes: int) -> Tensor:
    """[codes] int64: the word id of every image code, by the names in Chameleon's `text_tokenizer.json`.

    A code's word is IMGIMG, its decimal digits as letters A (0) to J (9), and Z. Raises VgenError for another file, or
    when a code has no word.
    """
    path = Path(path)
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VgenError(f"{path} is not Chameleon's text tokenizer ({error}); it comes with vqgan.ckpt") from error
    digits = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = ["IMGIMG" + str(code).translate(digits) + "Z" for code in range(codes)]
    missing = [name for name in names if name not in words]
    if missing:
        raise VgenError(
            f"{path} has no word for {len(missing)} of {codes} image codes (the first is {missing[0]}); "
            "is it the tokenizer of Chameleon's release?"
        )
    return torch.tensor([words[name] for name in names])
