"""The first TiTok models, trained in two stages (arXiv 2406.07550, section 3.3): L-32, B-64, S-128.

The decoder predicts, for every patch, which code MaskGIT-VQGAN would have there (a "proxy code": stage 1 trains that by
cross-entropy), and a copy of that VQGAN's decoder makes pixels from the *expected* code vector, softmax(logits) · codebook,
without an argmax (stage 2 trains it with the transformer decoder). One-stage models are in titok.py.

Shapes: B batch, N tokens, C channels of a code, K proxy codes on a grid g x g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from einops import einsum, rearrange
from torch import Tensor, nn

from vgen.checkpoints import read_state_dict
from vgen.errors import VgenError
from vgen.exports import Exported
from vgen.tokenizers_vis.base import TokenSpec
from vgen.tokenizers_vis.latents.quantizers import Quantized, VectorQuantizer
from vgen.tokenizers_vis.maskgit_vqgan import Codebook
from vgen.tokenizers_vis.maskgit_vqgan import Decoder as VQGANDecoder
from vgen.tokenizers_vis.titok.blocks import Encoder, ProxyDecoder, initialise
from vgen.tokenizers_vis.titok.titok import BASE, LARGE, SMALL, DiscreteTiTok

# Keyword arguments of TiTokLegacy: the released files (arXiv 2406.07550, table 6).
SIZES: dict[str, dict[str, Any]] = {
    "l32": {"num_tokens": 32, "encoder_shape": LARGE, "decoder_shape": LARGE},  # 641 M
    "b64": {"num_tokens": 64, "encoder_shape": BASE, "decoder_shape": BASE},  # 205 M
    "s128": {"num_tokens": 128, "encoder_shape": SMALL, "decoder_shape": SMALL},  # 84 M
}


class TiTokLegacy(DiscreteTiTok, Exported, ModelMixin, ConfigMixin):
    """Transformer encoder, codebook of unit vectors, transformer decoder to proxy codes, convolutional decoder to pixels.

    image_size to usage_window: as in `TiTokVQ`; proxy_codes: K; pixel_width, pixel_mult, pixel_blocks, pixel_channels,
    num_groups: hidden_channels, channel_mult, num_res_blocks, z_channels, num_groups of the MaskGITVQGAN that the pixel half
    (its codebook and decoder) comes from.
    """

    SIZES = SIZES

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        encoder_patch_size: int = 16,
        decoder_patch_size: int = 16,
        encoder_shape: Sequence[int] = LARGE,
        decoder_shape: Sequence[int] = LARGE,
        num_tokens: int = 32,
        channels: int = 12,
        codebook_size: int = 4096,
        codebook_l2_norm: bool = True,
        commit_loss_beta: float = 0.25,
        usage_window: int = 0,
        proxy_codes: int = 1024,
        pixel_width: int = 128,
        pixel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        pixel_blocks: int = 2,
        pixel_channels: int = 256,
        num_groups: int = 32,
    ):
        super().__init__()
        if 2 ** (len(pixel_mult) - 1) != decoder_patch_size:
            raise VgenError(
                f"the pixel decoder makes {2 ** (len(pixel_mult) - 1)} pixels a side of a proxy code, the transformer decoder's patches "
                f"have {decoder_patch_size}; pixel_mult needs log2(decoder_patch_size) + 1 levels"
            )
        self.latent_tokens = nn.Parameter(torch.randn(num_tokens, encoder_shape[0]) / encoder_shape[0] ** 0.5)
        self.encoder = Encoder(encoder_shape, image_size, encoder_patch_size, num_tokens, channels)
        self.decoder = ProxyDecoder(decoder_shape, image_size, decoder_patch_size, num_tokens, channels, proxy_codes)
        self.pixel_decoder = VQGANDecoder(pixel_channels, pixel_width, pixel_mult, pixel_blocks, 3, num_groups)
        initialise(self)
        self.quantize = VectorQuantizer(
            codebook_size, channels, codebook_l2_norm, commit_loss_beta, window=usage_window
        )
        # Not unit rows, as VectorQuantizer starts with: short vectors turn faster under Adam, and the paper's recipe counts on it.
        nn.init.uniform_(self.quantize.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.pixel_quantize = Codebook(proxy_codes, pixel_channels)
        self.spec = TokenSpec((1, image_size, image_size), vocabulary=codebook_size, sequence=num_tokens)

    @classmethod
    def from_original(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: str | Mapping[str, Any] = "l32",
        vqgan: str | Path | Mapping[str, Tensor] | None = None,
    ) -> TiTokLegacy:
        """A model from a published file or its state dict. config: a size or keyword arguments.

        vqgan: the MaskGIT-VQGAN file (or state dict) with the pixel half, for a stage-1 checkpoint, which has none.
        Raises VgenError when a file is no such checkpoint or its shapes do not fit the config.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        if not any(key.startswith("pixel_") for key in state):
            if vqgan is None:
                raise VgenError(
                    "this TiTok checkpoint has no pixel decoder (it is of stage 1); pass vqgan=, the MaskGIT-VQGAN file"
                )
            state |= pixel_half(vqgan if isinstance(vqgan, Mapping) else read_state_dict(vqgan))
        return super().from_original(state, config)

    from_single_file = from_original

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> what the quantizer gets: [B, C, 1, N], with the published models' reinterpretation."""
        return self.encoder.project_reinterpreted(self.latents(pixels))

    def expected_codes(self, logits: Tensor) -> Tensor:
        """Logits [B, K, g, g] -> expected vectors of the pixel codebook [B, pixel_channels, g, g]."""
        weights = logits.softmax(dim=1)
        return einsum(weights, self.pixel_quantize.embedding.weight.to(weights), "b k h w, k c -> b c h w")

    def reconstruct(self, vectors: Tensor, condition: None = None) -> Tensor:
        """Code vectors [B, C, 1, N] -> pixels [B, 3, H, W], not clamped. A condition raises VgenError: there is no text here."""
        return self.pixel_decoder(self.expected_codes(self.decoder(vectors, condition))) * 2 - 1

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive GAN weight looks at: the pixel decoder's last convolution."""
        return self.pixel_decoder.conv_out.weight


def pixel_half(vqgan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A MaskGIT-VQGAN's codebook and decoder under the names that TiTok gives them, without its usage queue."""
    wanted = (key for key in vqgan if not key.startswith("encoder.") and key != "quantize.codebook_used")
    return {f"pixel_{key}": vqgan[key] for key in wanted}


def proxy_loss(logits: Tensor, codes: Tensor, quantized: Quantized) -> dict[str, Tensor]:
    """Objective of stage 1: cross-entropy (nats a patch, fp32) against proxy codes, plus the quantizer's losses.

    logits [B, K, g, g], codes [B, g*g] int64, raster order.
    """
    logits = rearrange(logits.float(), "b k h w -> b k (h w)")
    loss = F.cross_entropy(logits, codes)
    accuracy = (logits.detach().argmax(dim=1) == codes).float().mean()
    return {
        "loss": loss + quantized.vq + quantized.commit,
        "cross_entropy": loss.detach(),
        "accuracy": accuracy,
        "vq": quantized.vq.detach(),
        "commit": quantized.commit.detach(),
    }
