"""MingTok (arXiv 2510.06590): one continuous tokenizer for generation and understanding; 32 pixels a token.

    pixels -> low-level encoder -> latents [B, N, C] -> semantic decoder (causal) -> features [B, N, D] -> pixel decoder -> pixels

Latents are what generators make; features are what language models read, and what pixels are decoded from. A latent is
deterministic: there is no posterior. The semantic decoder is causal, so that features can be made token by token while
latents are being generated (`start`, `expand`), equal to those of the whole sequence.

The encoder also gives a class token behind the N patches. Causality keeps it out of the patches' features, so generation
leaves it out, and so do `encode`, `features` and `decode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError
from vgen.exports import Exported
from vgen.layers.pixels import centre_square, to_pixels
from vgen.samplers.types import Grid
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import TokenSpec, check_latents, check_pixels, fitting_grid, refuse_steps
from vgen.tokenizers_vis.mingtok.nets import (
    Hidden,
    LowLevelEncoder,
    PixelDecoder,
    SemanticDecoder,
    SemanticMemory,
    subdivide,
    unpatchify,
)

# Keyword arguments of MingTok. vision: the released model. emoji-f8: ours, for 64-px pictures on CPUs; `calibrate` sets its scale.
SIZES: dict[str, dict[str, Any]] = {
    "vision": {},  # 698 M
    "emoji-f8": {  # 3.4 M
        "image_size": 64,
        "patch_size": 8,
        "latent_channels": 16,
        "encoder_width": 192,
        "encoder_depth": 3,
        "semantic_width": 192,
        "semantic_depth": 3,
        "pixel_patch_size": 4,
        "pixel_width": 128,
        "pixel_depth": 3,
        "latent_mean": 0.0,
        "latent_scale": 1.0,
    },
}


@dataclass(frozen=True)
class MingTokOutput:
    """A whole forward. latents [B, N + 1, C] and features [B, N + 1, D]: of the patches, then of the class token (normalised
    latents); reconstruction [B, 3, H, W], not clamped."""

    latents: Tensor
    features: Tensor
    reconstruction: Tensor

    @property
    def tokens(self) -> Tensor:
        """The latents of the patches [B, N, C], as `encode` gives them."""
        return self.latents[:, :-1]


class MingTok(NamedSizes, Exported, ModelMixin, ConfigMixin):
    """Encoder, semantic decoder, pixel decoder. Keys and values equal the published file.

    image_size: pixels per side at which the encoder's positions are not interpolated; patch_size: pixels per side of a
    latent; latent_channels: C; *_width, *_depth: of the three transformers, heads have 64 channels; semantic_width: also D;
    pixel_patch_size: pixels per side that one token of the pixel decoder makes; latent_mean, latent_scale: tokens are
    (raw latent - mean) / scale. Loaded with dtype=torch.bfloat16 the pixel decoder stays in fp32, as in the release.
    """

    SIZES = SIZES
    _supports_gradient_checkpointing = True
    _repeated_blocks = ("ViTBlock",)
    _no_split_modules = ("ViTBlock",)
    _keep_in_fp32_modules: ClassVar[list[str]] = ["sem_to_pix", "pixel_decoder"]  # diffusers wants a list

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 512,
        patch_size: int = 32,
        latent_channels: int = 32,
        encoder_width: int = 768,
        encoder_depth: int = 12,
        semantic_width: int = 1024,
        semantic_depth: int = 24,
        pixel_patch_size: int = 16,
        pixel_width: int = 1024,
        pixel_depth: int = 24,
        latent_mean: float = 1.46817409,
        latent_scale: float = 8.09449291,
    ):
        super().__init__()
        if patch_size % pixel_patch_size:
            raise VgenError(
                f"patch_size {patch_size} must be a multiple of pixel_patch_size {pixel_patch_size}: every latent becomes "
                "a square of pixel patches"
            )
        self.ratio = patch_size // pixel_patch_size
        self.low_level_encoder = LowLevelEncoder(image_size, patch_size, encoder_width, encoder_depth, latent_channels)
        self.semantic_decoder = SemanticDecoder(latent_channels, semantic_width, semantic_depth)
        self.sem_to_pix = nn.Linear(semantic_width, self.ratio**2 * pixel_width)
        self.pixel_decoder = PixelDecoder(pixel_patch_size, pixel_width, pixel_depth)
        self.spec = TokenSpec(downsample=(1, patch_size, patch_size), channels=latent_channels)

    # -- construction ----------------------------------------------------------------------------------------------

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "vision"
    ) -> MingTok:
        """A model from the published file, or its state dict. config: a size of SIZES or keyword arguments.

        The frozen teachers in training files (`target_backbone…`) are left aside, as in the release. Raises VgenError when
        the file is no such checkpoint or its shapes do not fit the config.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        load_exactly(model, state, ignore=("target_backbone",))
        return model.eval()

    from_single_file = from_original

    # -- pictures in -----------------------------------------------------------------------------------------------

    @staticmethod
    def preprocess(image: Image.Image, size: int = 512) -> Tensor:
        """A picture -> [3, size, size] in [-1, 1]: short side to `size`, centre. Generation: 512, understanding: 1024."""
        return to_pixels(centre_square(image, size))

    def raw_latents(self, pixels: Tensor, hidden: Hidden | None = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, N + 1, C] as the semantic decoder reads them, the class token's last."""
        if pixels.dim() != 4:
            raise VgenError(
                f"MingTok takes pictures [B, 3, H, W], got {list(pixels.shape)}; encode clips frame by frame"
            )
        self.spec.grid(*pixels.shape[-2:])
        return self.low_level_encoder(pixels, hidden)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents -> tokens as generators make them."""
        return (raw - self.config.latent_mean) / self.config.latent_scale

    def denormalise(self, tokens: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return tokens * self.config.latent_scale + self.config.latent_mean

    def encode(self, pixels: Tensor, noise: Any = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> normalised latents of the patches [B, N, C], raster order. noise is not used.

        Sides are multiples of patch_size; sizes other than the square of `image_size` use interpolated positions.
        """
        check_pixels(pixels)
        return self.normalise(self.raw_latents(pixels)[:, :-1])

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> semantic features of the patches [B, N, D], for understanding."""
        return self.semantic_decoder(self.raw_latents(pixels)[:, :-1])

    # -- latents to features to pixels -----------------------------------------------------------------------------

    def start(self, batch: int, tokens: int) -> SemanticMemory:
        """An empty memory for `expand`: `batch` sequences of at most `tokens` latents. One per picture."""
        return self.semantic_decoder.start(batch, tokens)

    def expand(self, tokens: Tensor, memory: SemanticMemory | None = None) -> Tensor:
        """Normalised latents [B, n, C] -> features [B, n, D] of all n. memory: the latents before them; these enter it.

        The release drops the last feature of every call with n > 1 (it takes it for the class token's); this does not.
        """
        raw = self.denormalise(tokens).to(self.semantic_decoder.in_proj.weight.dtype)
        return self.semantic_decoder(raw, memory)

    def patches(self, features: Tensor, grid: Grid) -> Tensor:
        """Features [B, N, D] -> patches of pixels [B, N r r, p p 3], not clamped, in raster order; fp32 whatever the autocast."""
        with torch.autocast(features.device.type, enabled=False):
            wide = self.sem_to_pix(features.to(self.sem_to_pix.weight.dtype))
            return self.pixel_decoder(subdivide(wide, grid[1], self.ratio))

    def reconstruct(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Features [B, N, D] -> pixels [B, 3, H, W] in [-1, 1]. grid: None means square, as in all published uses."""
        return self._pixels(features, fitting_grid(features, grid)).clamp(-1, 1)

    def _pixels(self, features: Tensor, grid: Grid) -> Tensor:
        return unpatchify(self.patches(features, grid), grid[1] * self.ratio, self.config.pixel_patch_size)

    def decode(
        self,
        tokens: Tensor,
        grid: Grid | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Any = None,
    ) -> Tensor:
        """Normalised latents [B, N, C] -> pixels [B, 3, H, W] in [-1, 1]. grid: None means square.

        The decoder is deterministic and unconditional: steps and guidance raise VgenError, condition and noise are not used.
        """
        refuse_steps(steps, guidance)
        check_latents(tokens, self.spec.channels)
        return self.reconstruct(self.expand(tokens), grid)

    # -- training --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, pixels: Tensor) -> float:
        """Sets `latent_mean` and `latent_scale` to mean and standard deviation of the latents of these pictures; returns the latter.

        Call it once after training, on a few hundred pictures [B, 3, H, W]: generators learn latents in this scale.
        """
        deviation, mean = torch.std_mean(self.raw_latents(pixels)[:, :-1].float())
        self.register_to_config(latent_mean=mean.item(), latent_scale=deviation.item())
        return deviation.item()

    def forward(self, pixels: Tensor, hidden: Hidden | None = None) -> MingTokOutput:
        """[B, 3, H, W] in [-1, 1] -> everything. hidden: patches that the encoder does without; see mingtok_training.py."""
        raw = self.raw_latents(pixels, hidden)
        features = self.semantic_decoder(raw)
        reconstruction = self._pixels(features[:, :-1], self.spec.grid(*pixels.shape[-2:]))
        return MingTokOutput(self.normalise(raw), features, reconstruction)
