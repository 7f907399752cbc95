"""The VAE below FlexTok: an f8 autoencoder of the SDXL kind with 4, 8 or 16 channels (arXiv 2502.13967; 2307.01952, section 2.4).

The network is diffusers' AutoencoderKL, whose parameter names the published files use; this class adds vgen's contract and
the scale of the latents. It is a continuous tokenizer by itself, and the latent space of FlexTok.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError
from vgen.exports import Exported
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import LatentTokenizer, TokenSpec
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian

# Keyword arguments of FlexTokVAE. c16 is the one inside the published FlexTok files, with their scale. What c4 and c8 were
# scaled with is not known: 1.0 leaves their latents as they are.
SIZES: dict[str, dict[str, Any]] = {
    "c16": {"latent_channels": 16},
    "c8": {"latent_channels": 8, "scale": 1.0},
    "c4": {"latent_channels": 4, "scale": 1.0},
}
# Attention layers in files of diffusers before 0.14, and their names today.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class FlexTokVAE(NamedSizes, LatentTokenizer, Exported, ModelMixin, ConfigMixin):
    """AutoencoderKL with scaled latents.

    latent_channels: C; block_out_channels: width of every level, finest first (each level but the last halves the sides);
    layers_per_block: ResNet blocks per encoder level (the decoder has one more); norm_num_groups: of every GroupNorm;
    scale: latents are multiplied by it, so that generators see numbers of about unit variance.
    """

    SIZES = SIZES

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        scale: float = 0.88,
    ):
        super().__init__()
        levels = len(block_out_channels)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
        )
        factor = 2 ** (levels - 1)
        self.spec = TokenSpec(downsample=(1, factor, factor), channels=latent_channels)

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "c16"
    ) -> FlexTokVAE:
        """A model from a published `diffusion_pytorch_model.safetensors` (or its state dict).

        config: a size of SIZES or keyword arguments. Raises VgenError for another file or size.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        load_exactly(model.vae, modern_names(state))
        return model.eval()

    from_single_file = from_original

    @classmethod
    def from_autoencoder(cls, folder: str | Path, scale: float | None = None) -> FlexTokVAE:
        """A model from a folder of diffusers' AutoencoderKL (any of its sizes whose levels are all plain).

        scale: None takes `scaling_factor` of its config; raises VgenError when that is not set either.
        """
        source = AutoencoderKL.from_pretrained(folder)
        scale = source.config.scaling_factor if scale is None else scale
        if scale is None:
            raise VgenError(f"{folder} does not say its scaling_factor; pass the scale of its latents")
        names = ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
        return cls.from_original(source.state_dict(), {**{n: source.config[n] for n in names}, "scale": scale})

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """[B, 3, H, W] in [-1, 1] -> the Gaussian over unscaled latents [B, C, h, w], fp32."""
        moments = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0].parameters
        return DiagonalGaussian.from_moments(moments.float())

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, C, h, w] -> pixels [B, 3, H, W] around [-1, 1], not clamped."""
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the attention names (and 2-D weights) that diffusers has used since 0.14."""
    renamed = {}
    for key, value in state.items():
        *front, layer, kind = key.split(".")
        if layer in OLD_NAMES:
            key = ".".join((*front, OLD_NAMES[layer], kind))
            value = value.flatten(1) if kind == "weight" else value  # 1x1 convolutions then
        renamed[key] = value
    return renamed
