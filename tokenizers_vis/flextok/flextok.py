"""FlexTok: a picture as 1 to 256 ordered tokens, from coarse to fine (arXiv 2502.13967, ICML 2025).

A transformer with registers resamples the latent map of a VAE into a sequence of N vectors, each rounded to a code by finite
scalar quantization. The decoder is a rectified flow over the latent map under any number of leading codes: training keeps
a random number of them ("nested dropout"), so the first code says what the picture is about and every further one adds detail.

The number of kept tokens changes the picture, not the cost: the sequence always has all registers.

Shapes: B batch, C latent channels, h x w latent map, N registers, k <= N tokens at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError
from vgen.exports import Exported
from vgen.samplers.flow import FlowGuidance, ProjectedGuidance, euler, even_times
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.types import Grid
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import TokenSpec, check_pixels, check_tokens
from vgen.tokenizers_vis.flextok.files import file_facts
from vgen.tokenizers_vis.flextok.nets import FlexTokDecoder, FlexTokEncoder
from vgen.tokenizers_vis.flextok.vae import modern_names
from vgen.tokenizers_vis.latents.fsq import FiniteScalarQuantizer
from vgen.tokenizers_vis.registry import tokenizer_class

EMOJI: dict[str, Any] = {
    "encoder_width": 192,
    "encoder_depth": 4,
    "decoder_width": 192,
    "decoder_depth": 4,
    "head_dim": 32,
    "max_grid": (8, 8),
    "registers": 64,
    "levels": (8, 5, 5, 5),
}
# Keyword arguments of FlexTok: width and depth of encoder and decoder, heads of 64 (paper, section 4, and the model names).
# emoji-f8: ours, for 64-px pictures on CPUs, over the 8x8 latents of the emoji KL VAE. emoji-pixels: without a VAE.
SIZES: dict[str, dict[str, Any]] = {
    "d12-d12": {"guidance": 15.0},
    "d18-d18": {"encoder_width": 1152, "encoder_depth": 18, "decoder_width": 1152, "decoder_depth": 18},
    "d18-d28": {"encoder_width": 1152, "encoder_depth": 18, "decoder_width": 1792, "decoder_depth": 28},
    "emoji-f8": {**EMOJI, "vae_family": "kl", "patch_size": 1},
    "emoji-pixels": {**EMOJI, "vae_family": None, "patch_size": 8},
}
Noise = Tensor | PhiloxNoise | None


class FlexTok(NamedSizes, Exported, ModelMixin, ConfigMixin):
    """VAE, register encoder, quantizer and flow decoder. Keys and values equal the published files.

    vae_family: of the tokenizer of Gaussian latents below, in `registry.TOKENIZERS` (None: the maps are the pixels);
    vae_options: its constructor's arguments. *_width, *_depth, head_dim: of the two transformers; patch_size: latents per side of a patch;
    max_grid: (rows, columns) of patches of the largest picture; registers: N; levels: of the quantizer; frequencies,
    max_time: of the time embedding; guidance, steps: what `decode` uses when it is not told.
    """

    SIZES = SIZES
    _supports_gradient_checkpointing = True
    _repeated_blocks = ("EncoderBlock", "DecoderBlock")
    _no_split_modules = ("EncoderBlock", "DecoderBlock")

    @register_to_config
    def __init__(
        self,
        *,
        vae_family: str | None = "flextok_vae",
        vae_options: Mapping[str, Any] | None = None,
        encoder_width: int = 768,
        encoder_depth: int = 12,
        decoder_width: int = 768,
        decoder_depth: int = 12,
        head_dim: int = 64,
        patch_size: int = 2,
        max_grid: Sequence[int] = (16, 16),
        registers: int = 256,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        frequencies: int = 256,
        max_time: float = 1.0,
        guidance: float = 7.5,
        steps: int = 25,
    ):
        super().__init__()
        self.vae = None if vae_family is None else _make_vae(vae_family, vae_options or {})
        self.channels = 3 if self.vae is None else self.vae.spec.channels
        self.downsample = 1 if self.vae is None else self.vae.spec.downsample[1]
        self.quantizer = FiniteScalarQuantizer(tuple(levels))
        max_grid = tuple(max_grid)
        shared = (head_dim, patch_size, max_grid, registers, self.quantizer.channels)
        self.encoder = FlexTokEncoder(self.channels, encoder_width, encoder_depth, *shared)
        self.decoder = FlexTokDecoder(self.channels, decoder_width, decoder_depth, *shared, frequencies, max_time)
        patch = patch_size * self.downsample  # pixels per side of a patch
        self.size = (max_grid[0] * patch, max_grid[1] * patch)
        self.spec = TokenSpec((1, *self.size), vocabulary=self.quantizer.vocabulary, sequence=registers, multiple=patch)

    # -- construction ----------------------------------------------------------------------------------------------

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "d12-d12"
    ) -> FlexTok:
        """A model from a published `model.safetensors` (VAE included), its folder, or its state dict.

        config: a size of SIZES or keyword arguments; what it leaves open is taken from the file's own config (`file_facts`).
        Raises VgenError for another family or size, and for a file that does not say how time is scaled when `config` does
        not either (`max_time`): a guess would give wrong pictures.
        """
        options = cls.size_config(config) if isinstance(config, str) else dict(config)
        if isinstance(source, Mapping):
            state = dict(source)
        else:
            state, facts = read_state_dict(source), file_facts(source)
            if "max_time" not in {**facts, **options}:
                raise VgenError(
                    f"{source} does not say its max_timestep, in its metadata or in a config.json beside it; download "
                    "config.json, too, or pass max_time (1.0 or 1000.0) in the config"
                )
            if "scale" in facts:
                options["vae_options"] = {"scale": facts["scale"], **(options.get("vae_options") or {})}
            options = {**{name: facts[name] for name in ("max_time", "levels") if name in facts}, **options}
        with torch.device("meta"):
            model = cls(**options)
        # The head that aligns features with DINOv2 in training may be in the file; decoding does not read it.
        load_exactly(model, modern_names(state), ignore=("decoder.module_dict.dec_repa",))
        return model.eval()

    from_single_file = from_original

    # -- latent maps -----------------------------------------------------------------------------------------------

    def latents(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> scaled latent maps [B, C, h, w] fp32. noise: N(0, 1) of that shape, None: the mode."""
        if self.vae is None:
            return pixels
        with torch.autocast(pixels.device.type, enabled=False):  # as released: the VAE runs in fp32
            return self.vae.posterior(pixels.float()).sample(noise) * self.vae.config.scale

    def pixels(self, latents: Tensor) -> Tensor:
        """Scaled latent maps [B, C, h, w] -> [B, 3, H, W] around [-1, 1], not clamped."""
        if self.vae is None:
            return latents
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.reconstruct(latents.float() / self.vae.config.scale)

    # -- use -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, N] int64, the most important first. H, W: any multiples of the patch up to `size`.

        noise: N(0, 1) of the latent map's shape [B, C, H/f, W/f], for a sample of the VAE's posterior, as released (the same
        picture then gives other tokens every time). None: its mode.
        """
        check_pixels(pixels)
        self.spec.grid(*pixels.shape[-2:])
        z = self.encoder(self.latents(pixels, noise).to(self.dtype))
        return self.quantizer.quantize(z)[1]

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        grid: Grid | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | Callable[[float], float] | FlowGuidance | None = None,
        noise: Noise = None,
        *,
        num_tokens: int | Sequence[int] | Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Codes [B, k], 1 <= k <= N -> pixels [B, 3, H, W] around [-1, 1], not clamped.

        num_tokens: how many of the k leading codes count, for all samples or one number each (None: all).
        steps: Euler steps; each runs the decoder once on B rows, or on 2B with guidance. guidance: the scale of adaptive
        projected guidance (1: none), a function of the time, or a FlowGuidance (None: the model's). noise: the map at time 1,
        [B, C, h, w], or a PhiloxNoise (None: seed 0, sample = row of the batch). size: (H, W) of the picture (None: what the
        model was made for). grid and condition are not used: a sequence has no shape. Raises VgenError for what does not fit.
        """
        count = self.config.registers
        if isinstance(tokens, Tensor) and (tokens.dim() != 2 or not 1 <= tokens.shape[1] <= count):
            raise VgenError(f"this FlexTok decodes 1 to {count} tokens a picture, [B, k], got {list(tokens.shape)}")
        check_tokens(tokens, self.spec.vocabulary)
        batch, given = tokens.shape
        height, width = size or self.size
        self.spec.grid(height, width)
        steps = self.config.steps if steps is None else steps
        codes = self.quantizer.codes(F.pad(tokens, (0, count - given)))  # what pads is overwritten
        keep = self._kept(num_tokens, batch, given, tokens.device)
        shape = (batch, self.channels, height // self.downsample, width // self.downsample)
        x = self._start(noise, shape, tokens.device)
        velocity = self.velocity(codes, keep, self._guidance(guidance))
        return self.pixels(euler(velocity, x, even_times(steps)))

    def velocity(self, codes: Tensor, keep: Tensor | None, guidance: FlowGuidance) -> Callable[[Tensor, float], Tensor]:
        """The guided velocity field (x [B, C, h, w], time) -> [B, C, h, w] of codes [B, N, d]; keep [B]: how many count.

        One call is one pass of the decoder over all guidance rows. Good for one trajectory: APG remembers.
        """
        rows = len(guidance.rows)
        mix = guidance.start()
        registers = self.decoder.registers(codes, keep)
        registers = torch.cat((registers, self.decoder.null_registers(len(codes)))) if rows == 2 else registers

        def field(x: Tensor, time: float) -> Tensor:
            times = torch.full((len(registers),), time, device=x.device)
            parts, _ = self.decoder(x.repeat(rows, 1, 1, 1).to(self.dtype), times, registers)
            return mix(rearrange(parts, "(r b) c h w -> r b c h w", r=rows), guidance.weights(time))

        return field

    @torch.no_grad()
    def reconstruct(
        self,
        pixels: Tensor,
        num_tokens: Sequence[int] | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | FlowGuidance | None = None,
    ) -> Tensor:
        """[B, 3, H, W] -> [K, B, 3, H, W]: the pictures from their first 1, 2, 4, …, N tokens (or `num_tokens`).

        All counts start from the same noise (`seed`), so that they differ by their tokens only. steps, guidance: of `decode`.
        """
        tokens = self.encode(pixels)
        noise = PhiloxNoise(seed, torch.arange(len(pixels)))
        counts = token_counts(self.config.registers) if num_tokens is None else num_tokens
        size = tuple(pixels.shape[-2:])
        return torch.stack(
            [
                self.decode(tokens, steps=steps, guidance=guidance, noise=noise, num_tokens=count, size=size)
                for count in counts
            ]
        )

    # -- arguments of decode ---------------------------------------------------------------------------------------

    def _kept(
        self, num_tokens: int | Sequence[int] | Tensor | None, batch: int, given: int, device: torch.device
    ) -> Tensor:
        """[B] int64, checked on the host."""
        counts = torch.as_tensor(given if num_tokens is None else num_tokens, device="cpu", dtype=torch.long)
        if counts.dim() > 1 or counts.numel() not in (1, batch):
            raise VgenError(f"num_tokens is one number, or one for each of the {batch} pictures, got {counts.tolist()}")
        low, high = int(counts.min()), int(counts.max())
        if low < 1 or high > given:
            raise VgenError(
                f"num_tokens must lie in 1..{given}, as many as there are tokens, got {low}"
                + (f"..{high}" if high > low else "")
            )
        return counts.expand(batch).to(device)

    def _guidance(self, guidance: float | Callable[[float], float] | FlowGuidance | None) -> FlowGuidance:
        if isinstance(guidance, FlowGuidance):
            return guidance
        return ProjectedGuidance(self.config.guidance if guidance is None else guidance)

    @staticmethod
    def _start(noise: Noise, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if isinstance(noise, Tensor):
            if tuple(noise.shape) != shape:
                raise VgenError(f"the noise of these pictures has the shape {list(shape)}, got {list(noise.shape)}")
            return noise.to(device, torch.float32)
        noise = PhiloxNoise(0, torch.arange(shape[0])) if noise is None else noise
        if len(noise.samples) != shape[0]:
            raise VgenError(f"the noise is for {len(noise.samples)} pictures, got tokens of {shape[0]}")
        return noise.picture(shape, device)


def token_counts(count: int) -> list[int]:
    """1, 2, 4, … below `count`, and `count` itself: the numbers of tokens that training keeps."""
    return [1 << i for i in range((count - 1).bit_length())] + [count]


def _make_vae(family: str, options: Mapping[str, Any]) -> ModelMixin:
    kind = tokenizer_class(family)
    if not (hasattr(kind, "posterior") and hasattr(kind, "reconstruct")):
        raise VgenError(f"FlexTok works on the latents of a VAE, and {family} is none; name kl or flextok_vae")
    return kind(**options)
