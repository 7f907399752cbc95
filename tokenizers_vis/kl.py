"""The KL-16 autoencoder of MAR (arXiv 2406.11838), a VAE after LDM (arXiv 2112.10752, section 3.1), and small sizes for 64 px.

TokenBridge, Hi-MAR and xAR use the same file. The encoder attends in its coarsest level and in the middle, the decoder in the
middle only: its authors call that an oversight, the weights were trained with it.

Shapes: B batch, C latent channels, h x w the latent grid, N = h * w tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError
from vgen.exports import Exported
from vgen.layers.conv import Decoder, Encoder
from vgen.layers.taming import rename_taming, taming_facts
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import LatentTokenizer, TokenSpec
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian

# Keyword arguments of KLModel. kl-16: MAR's released file. emoji-kl-*: ours, for 64-px pictures on CPUs; `calibrate` sets their scale.
SIZES: dict[str, dict[str, Any]] = {
    "kl-16": {},  # 66.5 M
    "emoji-kl-f8": {"ch": 64, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 16, "patch_size": 4},  # 2.8 M
    "emoji-kl-f4": {  # 1.4 M
        "ch": 96,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "latent_channels": 8,
        "num_groups": 16,
        "patch_size": 4,
    },
}
PARTS = (
    "encoder.",
    "decoder.",
    "quant_conv.",
    "post_quant_conv.",
)  # of a checkpoint; training files hold losses besides


@dataclass(frozen=True)
class KLOutput:
    """A training forward: reconstruction [B, 3, H, W] and the posterior over latent maps [B, C, h, w]."""

    reconstruction: Tensor
    posterior: DiagonalGaussian


class KLModel(NamedSizes, LatentTokenizer, Exported, ModelMixin, ConfigMixin):
    """Convolutional encoder to a diagonal Gaussian, and decoder. Tokens are the latents times `scale`: [B, N, C].

    ch: base width; ch_mult: width multipliers, finest level first; num_res_blocks: per level (one more in the decoder);
    latent_channels: C; encoder_attention, decoder_attention: levels (0 finest, -1 coarsest) with attention after every
    ResBlock; scale: what latents are multiplied with to have a standard deviation of about 1; num_groups: of every GroupNorm;
    patch_size: pixels per side that are folded into channels (1: none, as published); packing: latents per side that make one
    token of packing² C channels (1: every latent is a token). Downsampling = patch_size * 2 ** (levels - 1) * packing.
    """

    SIZES = SIZES
    coding_parts = ("encoder", "quant_conv")  # what decides about the tokens of a picture

    @register_to_config
    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        latent_channels: int = 16,
        encoder_attention: Sequence[int] = (-1,),
        decoder_attention: Sequence[int] = (),
        scale: float = 0.2325,
        num_groups: int = 32,
        dropout: float = 0.0,
        patch_size: int = 1,
        packing: int = 1,
    ):
        super().__init__()
        pixel_channels, options = 3 * patch_size**2, {"groups": num_groups, "dropout": dropout}
        self.encoder = Encoder(
            pixel_channels, ch, ch_mult, num_res_blocks, 2 * latent_channels, attention_levels=encoder_attention, **options
        )  # fmt: skip
        self.decoder = Decoder(
            latent_channels, ch, ch_mult, num_res_blocks, pixel_channels, attention_levels=decoder_attention, **options
        )  # fmt: skip
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        factor = patch_size * 2 ** (len(ch_mult) - 1) * packing
        self.packing = packing
        self.spec = TokenSpec(downsample=(1, factor, factor), channels=latent_channels * packing**2)

    # -- construction ----------------------------------------------------------------------------------------------

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] | None = "kl-16"
    ) -> KLModel:
        """A model from the published file (entry `model`) or its state dict.

        config: a size of SIZES, keyword arguments, or None: what names and shapes say, for autoencoders of LDM's code in general
        (their scale is not in the file: 1.0 then, see `calibrate`). Entries outside the autoencoder (`PARTS`) are left aside, as in the release. Raises VgenError when the file is no such
        checkpoint or its shapes do not fit the config.
        """
        state = source if isinstance(source, Mapping) else read_state_dict(source)
        parts = {key: value for key, value in state.items() if key.startswith(PARTS)}
        config = config_of(parts) if config is None else config
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        load_exactly(model, rename_taming(parts, len(model.config.ch_mult)))
        return model.eval()

    from_single_file = from_original

    # -- use -------------------------------------------------------------------------------------------------------

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """[B, 3, H, W] in [-1, 1] -> the Gaussian over unscaled latents [B, C, h, w], fp32."""
        folded = F.pixel_unshuffle(pixels, self.config.patch_size)
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(folded)).float())

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, C, h, w] -> pixels [B, 3, H, W], not clamped."""
        features = self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype))
        return F.pixel_shuffle(self.decoder(features), self.config.patch_size)

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> KLOutput:
        """[B, 3, H, W] -> reconstruction of a posterior sample. noise: N(0, 1) as latent maps [B, C, h, w] (None: the mode)."""
        posterior = self.posterior(pixels)
        return KLOutput(self.reconstruct(posterior.sample(noise)), posterior)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive GAN weight looks at: the decoder's last convolution."""
        return self.decoder.conv_out.weight


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of KLModel for a file under its own names. Raises VgenError for a file that is no VAE."""
    facts = taming_facts(state)
    moments = state["quant_conv.weight"].shape[0] if "quant_conv.weight" in state else 0
    if not facts.double_z or moments != 2 * facts.z_channels:
        raise VgenError(
            f"this file is no VAE of LDM's kind: expected an encoder and a quant_conv that make {2 * facts.z_channels} channels (mean and "
            f"log-variance of {facts.z_channels}), found {'them' if facts.double_z else 'no double_z'} and {moments}; a file with a "
            "codebook is a VQGAN, which TamingVQGAN reads"
        )
    return {
        "ch": facts.ch,
        "ch_mult": facts.ch_mult,
        "num_res_blocks": facts.num_res_blocks,
        "latent_channels": facts.z_channels,
        "encoder_attention": facts.attention_levels,
        "decoder_attention": facts.decoder_attention,
        "scale": 1.0,
    }
