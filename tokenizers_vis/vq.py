"""The VQ autoencoder of LlamaGen (arXiv 2406.06525, section 2.1): published VQ-16 and VQ-8, and small sizes for 64 px."""

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
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import CodeTokenizer, TokenSpec
from vgen.tokenizers_vis.latents.quantizers import Quantized, VectorQuantizer, with_bookkeeping

# Keyword arguments of VQModel. vq-16 and vq-8: LlamaGen, table 8 and its released files. emoji-*: ours, for 64-px pictures on CPUs.
SIZES: dict[str, dict[str, Any]] = {
    "vq-16": {"encoder_ch_mult": (1, 1, 2, 2, 4), "decoder_ch_mult": (1, 1, 2, 2, 4)},
    "vq-8": {"encoder_ch_mult": (1, 2, 2, 4), "decoder_ch_mult": (1, 2, 2, 4)},
    "emoji-f8": {
        "ch": 64,
        "encoder_ch_mult": (1, 2),
        "decoder_ch_mult": (1, 2),
        "num_res_blocks": 1,
        "z_channels": 64,
        "codebook_size": 2048,
        "num_groups": 16,
        "patch_size": 4,
    },
    "emoji-f4": {
        "ch": 96,
        "encoder_ch_mult": (1,),
        "decoder_ch_mult": (1,),
        "num_res_blocks": 1,
        "z_channels": 64,
        "codebook_size": 1024,
        "num_groups": 16,
        "patch_size": 4,
    },
}


@dataclass(frozen=True)
class VQOutput:
    """A training forward: reconstruction [B, 3, H, W] and what the quantizer said (codes and losses)."""

    reconstruction: Tensor
    quantized: Quantized


class VQModel(NamedSizes, CodeTokenizer, Exported, ModelMixin, ConfigMixin):
    """Encoder, L2-normalised codebook, decoder. Keys and values equal the published files.

    ch: base width; *_ch_mult: width multipliers, finest level first; num_res_blocks: per level; z_channels: width between the
    convolutional nets and the codebook; codebook_size x codebook_embed_dim: the codebook; commit_loss_beta,
    entropy_loss_ratio: quantizers.py; usage_window: length of the usage queue; num_groups: of every GroupNorm;
    patch_size: pixels per side that are folded into channels before the encoder and unfolded after the decoder (1: none, as
    published). Downsampling = patch_size * 2 ** (levels - 1).
    """

    SIZES = SIZES
    coding_parts = ("encoder", "quant_conv", "quantize")  # what decides about the tokens of a picture

    @register_to_config
    def __init__(
        self,
        ch: int = 128,
        encoder_ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        codebook_l2_norm: bool = True,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
        usage_window: int = 65536,
        num_groups: int = 32,
        dropout: float = 0.0,
        patch_size: int = 1,
    ):
        super().__init__()
        if len(encoder_ch_mult) != len(decoder_ch_mult):
            raise VgenError(
                f"encoder_ch_mult and decoder_ch_mult must have equally many levels, got {list(encoder_ch_mult)} and "
                f"{list(decoder_ch_mult)}; a different count would change the picture's size"
            )
        pixel_channels = 3 * patch_size**2
        options = {"groups": num_groups, "dropout": dropout}
        self.encoder = Encoder(pixel_channels, ch, encoder_ch_mult, num_res_blocks, z_channels, **options)
        self.decoder = Decoder(z_channels, ch, decoder_ch_mult, num_res_blocks, pixel_channels, **options)
        self.quantize = VectorQuantizer(
            codebook_size, codebook_embed_dim, codebook_l2_norm, commit_loss_beta, entropy_loss_ratio, usage_window
        )
        self.quant_conv = nn.Conv2d(z_channels, codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_embed_dim, z_channels, 1)
        factor = patch_size * 2 ** (len(encoder_ch_mult) - 1)
        self.spec = TokenSpec(downsample=(1, factor, factor), vocabulary=codebook_size)

    # -- construction ----------------------------------------------------------------------------------------------

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "vq-16"
    ) -> VQModel:
        """A model from a published file (or its state dict). config: a size of SIZES or keyword arguments.

        Raises VgenError when the file is no such checkpoint or its shapes do not fit the config.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        load_exactly(model, with_bookkeeping(model, state))
        return model.eval()

    from_single_file = from_original

    # -- use -------------------------------------------------------------------------------------------------------

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> what the quantizer gets: [B, C, h, w]."""
        patch = self.config.patch_size
        return self.quant_conv(self.encoder(F.pixel_unshuffle(pixels, patch) if patch > 1 else pixels))

    def pixels(self, quantized: Tensor) -> Tensor:
        """[B, C, h, w] code vectors -> [B, 3, H, W]; not clamped."""
        patch = self.config.patch_size
        out = self.decoder(self.post_quant_conv(quantized.to(self.post_quant_conv.weight.dtype)))
        return F.pixel_shuffle(out, patch) if patch > 1 else out

    def forward(self, pixels: Tensor) -> VQOutput:
        """[B, 3, H, W] in [-1, 1] -> reconstruction and quantizer losses (the losses in train mode only)."""
        quantized = self.quantize(self.features(pixels))
        return VQOutput(self.pixels(quantized.quantized), quantized)

    reconstruct = pixels

    def code_vectors(self, tokens: Tensor) -> Tensor:
        """Codes [...] -> code vectors [..., C] fp32."""
        return self.quantize.lookup(tokens)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive GAN weight looks at: the decoder's last convolution."""
        return self.decoder.conv_out.weight
