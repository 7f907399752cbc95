"""TiTok and TA-TiTok in one stage: a picture as 32 to 256 tokens without a grid (arXiv 2406.07550; text-aware: arXiv 2501.07730).

`TiTokVQ` has a codebook, `TiTokVAE` a diagonal Gaussian; both decode pixels directly. With `text_tokens` the decoder also
reads a caption's CLIP features, which decode() takes as `condition`. The first TiTok models (two stages, proxy codes) are in
titok_legacy.py. Parameter names are those of the published files; their value range [0, 1] is handled inside.

Shapes: B batch, N tokens, C channels of a token, T text tokens; latents are maps [B, C, 1, N].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError
from vgen.exports import Exported
from vgen.samplers.types import Grid
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import LatentTokenizer, TokenSpec, check_latents, check_pixels, check_tokens, refuse_steps
from vgen.tokenizers_vis.latents.online_clustering import OnlineClusteringQuantizer
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian
from vgen.tokenizers_vis.latents.quantizers import Quantized, VectorQuantizer, with_bookkeeping
from vgen.tokenizers_vis.titok.blocks import Encoder, PixelDecoder, initialise

# (width, layers, heads) of a transformer: arXiv 2406.07550, table 6.
SMALL, BASE, LARGE = (512, 8, 8), (768, 12, 12), (1024, 24, 16)
TEXT = {"text_tokens": 77, "text_width": 768}
# Ours, for 64-px pictures on CPUs.
EMOJI = {
    "image_size": 64,
    "encoder_patch_size": 8,
    "decoder_patch_size": 8,
    "encoder_shape": (192, 4, 3),
    "decoder_shape": (192, 6, 3),
}
# Keyword arguments of TiTokVQ and TiTokVAE: the released files (bl: base encoder, large decoder). ta-*: arXiv 2501.07730.
VQ_SIZES: dict[str, dict[str, Any]] = {
    "bl64": {"num_tokens": 64},  # 390 M
    "bl128": {"num_tokens": 128},
    "sl256": {"num_tokens": 256, "encoder_shape": SMALL},  # 330 M
    "ta-bl32": {"num_tokens": 32, **TEXT},  # 391 M
    "ta-bl64": {"num_tokens": 64, **TEXT},
    "ta-bl128": {"num_tokens": 128, **TEXT},
    "emoji-32": {**EMOJI, "num_tokens": 32, "channels": 8, "codebook_size": 2048, "codebook_l2_norm": True},  # 4.6 M
}
VAE_SIZES: dict[str, dict[str, Any]] = {
    "ll32": {"num_tokens": 32, "encoder_shape": LARGE},  # 607 M
    "bl64": {"num_tokens": 64},  # 389 M
    "bl128": {"num_tokens": 128},
    # Its scale is the one that MaskGen's KL generator was trained with; the others' is not published.
    "ta-bl32": {"num_tokens": 32, "scale": 0.7525, **TEXT},  # 390 M
    "ta-bl64": {"num_tokens": 64, **TEXT},
    "ta-sl128": {"num_tokens": 128, "encoder_shape": SMALL, **TEXT},  # 330 M
}


@dataclass(frozen=True)
class TiTokOutput:
    """A training forward: reconstruction [B, 3, H, W] in about [-1, 1], and what quantizer or posterior said."""

    reconstruction: Tensor
    quantized: Quantized | None = None
    posterior: DiagonalGaussian | None = None


class TiTok(NamedSizes):
    """What all TiTok classes share: construction, files, and the way to the latents.

    A subclass is a ModelMixin with `SIZES`, `spec`, `encoder`, `latent_tokens`, and two steps of decoding: vectors(tokens) ->
    [B, C, 1, N], reconstruct(vectors, condition) -> [B, 3, H, W].
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("Block",)
    _no_split_modules = ("Block",)
    coding_parts = ("latent_tokens", "encoder", "quantize")  # what decides about the tokens of a picture

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any]) -> Self:
        """A model from a published file (flat, .bin or .safetensors) or its state dict. config: a size or keyword arguments.

        Raises VgenError when the file is no such checkpoint or its shapes do not fit the config.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        load_exactly(model, with_bookkeeping(model, state), ignore=("quantize.embed_prob",))
        return model.eval()

    from_single_file = from_original

    def latents(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> the encoder's latents [B, N, W]."""
        if pixels.dim() != 4:
            raise VgenError(
                f"TiTok takes pictures [B, 3, H, W], got {list(pixels.shape)}; pass a clip's frames as a batch"
            )
        self.spec.grid(*pixels.shape[-2:])
        return self.encoder.features(((pixels + 1) / 2).to(self.latent_tokens.dtype), self.latent_tokens)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> what quantizer or posterior get: [B, C, 1, N], for a posterior [B, 2C, 1, N]."""
        return self.encoder.project(self.latents(pixels))

    def decode(
        self,
        tokens: Tensor,
        grid: Grid | None = None,
        condition: Tensor | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Any = None,
    ) -> Tensor:
        """Codes [B, N] or scaled latents [B, N, C] -> pixels [B, 3, H, W], not clamped.

        condition: a caption's features [B, T, text_width], for text-aware models and only for them. steps and guidance raise
        VgenError, noise is not used.
        """
        refuse_steps(steps, guidance)
        vectors = self.vectors(tokens)
        expected = (1, 1, self.spec.sequence)
        if tokens.shape[1] != self.spec.sequence or tuple(grid or expected) != expected:
            found = f"{tokens.shape[1]} tokens" + (f" on a grid {'x'.join(map(str, grid))}" if grid else "")
            raise VgenError(
                f"this TiTok decodes {self.spec.sequence} tokens, grid {'x'.join(map(str, expected))}, got {found}"
            )
        return self.reconstruct(vectors, condition)


class DiscreteTiTok(TiTok):
    """A TiTok with a codebook `quantize`."""

    def forward(self, pixels: Tensor, condition: Tensor | None = None) -> TiTokOutput:
        """[B, 3, H, W] in [-1, 1] (, text features [B, T, text_width]) -> reconstruction, codes and (in train mode) their losses."""
        quantized = self.quantize(self.features(pixels))
        return TiTokOutput(self.reconstruct(quantized.quantized, condition), quantized=quantized)

    def encode(self, pixels: Tensor, noise: Any = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, N] int64. noise is not used."""
        check_pixels(pixels)
        return self.quantize(self.features(pixels)).indices

    def vectors(self, tokens: Tensor) -> Tensor:
        """Codes [B, N] -> code vectors [B, C, 1, N]. VgenError for codes that do not exist."""
        check_tokens(tokens, self.spec.vocabulary)
        return rearrange(self.quantize.lookup(tokens), "b n c -> b c 1 n")


class TiTokVQ(DiscreteTiTok, Exported, ModelMixin, ConfigMixin):
    """Transformer encoder, codebook, transformer decoder to pixels.

    image_size: side of the pictures, the only one it takes; *_patch_size: side of a patch; *_shape: (width, layers, heads);
    num_tokens: N; channels: C of a code; codebook_l2_norm: compare unit vectors; commit_loss_beta: quantizers.py; clustering:
    online clustering of idle codes in training; usage_window: length of the usage queue (0: none, as in the published files);
    text_tokens, text_width: of the caption's features that the decoder reads (0: none).
    """

    SIZES = VQ_SIZES

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        encoder_patch_size: int = 16,
        decoder_patch_size: int = 16,
        encoder_shape: Sequence[int] = BASE,
        decoder_shape: Sequence[int] = LARGE,
        num_tokens: int = 64,
        channels: int = 64,
        codebook_size: int = 8192,
        codebook_l2_norm: bool = False,
        commit_loss_beta: float = 0.25,
        clustering: bool = False,
        usage_window: int = 0,
        text_tokens: int = 0,
        text_width: int = 768,
    ):
        super().__init__()
        self.latent_tokens = nn.Parameter(torch.randn(num_tokens, encoder_shape[0]) / encoder_shape[0] ** 0.5)
        self.encoder = Encoder(encoder_shape, image_size, encoder_patch_size, num_tokens, channels)
        self.decoder = PixelDecoder(
            decoder_shape, image_size, decoder_patch_size, num_tokens, channels, text_tokens, text_width
        )
        initialise(self)
        quantizer = OnlineClusteringQuantizer if clustering else VectorQuantizer
        self.quantize = quantizer(codebook_size, channels, codebook_l2_norm, commit_loss_beta, window=usage_window)
        self.spec = TokenSpec((1, image_size, image_size), vocabulary=codebook_size, sequence=num_tokens)

    def reconstruct(self, vectors: Tensor, condition: Tensor | None = None) -> Tensor:
        """Code vectors [B, C, 1, N] (, text features [B, T, text_width]) -> pixels [B, 3, H, W], not clamped."""
        return self.decoder(vectors, condition) * 2 - 1

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive GAN weight looks at: the decoder's last convolution."""
        return self.decoder.conv_out.weight


class TiTokVAE(TiTok, LatentTokenizer, Exported, ModelMixin, ConfigMixin):
    """Transformer encoder to a diagonal Gaussian, transformer decoder to pixels. Tokens are the latents times `scale`: [B, N, C].

    scale: what latents are multiplied with to have a standard deviation of about 1; the rest as in `TiTokVQ`.
    """

    SIZES = VAE_SIZES

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        encoder_patch_size: int = 16,
        decoder_patch_size: int = 16,
        encoder_shape: Sequence[int] = BASE,
        decoder_shape: Sequence[int] = LARGE,
        num_tokens: int = 64,
        channels: int = 16,
        scale: float = 1.0,
        text_tokens: int = 0,
        text_width: int = 768,
    ):
        super().__init__()
        self.latent_tokens = nn.Parameter(torch.randn(num_tokens, encoder_shape[0]) / encoder_shape[0] ** 0.5)
        self.encoder = Encoder(encoder_shape, image_size, encoder_patch_size, num_tokens, 2 * channels)
        self.decoder = PixelDecoder(
            decoder_shape, image_size, decoder_patch_size, num_tokens, channels, text_tokens, text_width
        )
        initialise(self)
        self.spec = TokenSpec((1, image_size, image_size), channels=channels, sequence=num_tokens)

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """[B, 3, H, W] in [-1, 1] -> the Gaussian over unscaled latents [B, C, 1, N], fp32."""
        return DiagonalGaussian.from_moments(self.features(pixels).float())

    def forward(self, pixels: Tensor, noise: Tensor | None = None, condition: Tensor | None = None) -> TiTokOutput:
        """[B, 3, H, W] -> reconstruction of a posterior sample. noise: N(0, 1) [B, C, 1, N] (None: the mode)."""
        posterior = self.posterior(pixels)
        return TiTokOutput(self.reconstruct(posterior.sample(noise), condition), posterior=posterior)

    def reconstruct(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        """Unscaled latents [B, C, 1, N] (, text features [B, T, text_width]) -> pixels [B, 3, H, W], not clamped."""
        return self.decoder(latents, condition) * 2 - 1

    def vectors(self, tokens: Tensor) -> Tensor:
        """Scaled latents [B, N, C] -> unscaled [B, C, 1, N]. VgenError for anything else."""
        check_latents(tokens, self.spec.channels)
        return rearrange(tokens / self.config.scale, "b n c -> b c 1 n")

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive GAN weight looks at: the decoder's last convolution."""
        return self.decoder.conv_out.weight
