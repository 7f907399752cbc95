"""TokenBridge (arXiv 2503.16430): discrete tokens from a continuous tokenizer that was trained without any quantisation.

A token has C channels of 2 ** bits levels each (16 x 64 as published), so its vocabulary is too large to be one number: tokens
are [B, N, C] int64. Works on any continuous tokenizer of vgen; published: the KL-16 of MAR with 6 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vgen.errors import VgenError, nearest
from vgen.exports import Exported
from vgen.samplers.types import Grid
from vgen.tokenizers_vis.base import check_tokens
from vgen.tokenizers_vis.latents.dimensionwise import DimensionwiseQuantizer
from vgen.tokenizers_vis.registry import class_families, tokenizer_class

# Keyword arguments of TokenBridge. kl-16-6bit: the tokenizer of both published generators.
SIZES: dict[str, dict[str, Any]] = {"kl-16-6bit": {"family": "kl", "bits": 6}}


class TokenBridge(Exported, ModelMixin, ConfigMixin):
    """A continuous tokenizer and a dimension-wise quantizer behind it. `quantize` makes one from a trained tokenizer.

    family: of the continuous tokenizer, in `registry.TOKENIZERS`; continuous: its constructor's arguments; bits: per channel;
    low, high: range of its (scaled) latents; std_range: see DimensionwiseQuantizer.
    """

    @register_to_config
    def __init__(
        self,
        *,
        family: str = "kl",
        continuous: Mapping[str, Any] | None = None,
        bits: int = 6,
        low: float = -5.0,
        high: float = 5.0,
        std_range: float = 3.0,
    ):
        super().__init__()
        self.tokenizer = tokenizer_class(family)(**(continuous or {}))
        spec = self.tokenizer.spec
        if spec.channels is None or spec.levels is not None:
            raise VgenError(f"only continuous tokenizers can be quantised by dimension, {family} has discrete tokens")
        self.quantizer = DimensionwiseQuantizer(bits, low, high, std_range)
        self.spec = replace(spec, levels=self.quantizer.levels)

    # -- construction ----------------------------------------------------------------------------------------------

    @classmethod
    def quantize(cls, continuous: ModelMixin, **options: Any) -> TokenBridge:
        """A trained continuous tokenizer, quantised; it is shared, not copied. options: bits, low, high, std_range."""
        families = class_families()
        kind = type(continuous).__name__
        if kind not in families:
            raise VgenError(f"a {kind} is none of vgen's tokenizers ({', '.join(families)})")
        config = {name: value for name, value in continuous.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = cls(family=families[kind], continuous=config, **options)
        model.tokenizer = continuous
        return model.to(continuous.device)

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "kl-16-6bit"
    ) -> TokenBridge:
        """The published file of a continuous tokenizer (or its state dict), quantised: quantisation has no weights.

        config: a size of SIZES or keyword arguments. Raises VgenError for another file, family or size.
        """
        if isinstance(config, str):
            if config not in SIZES:
                raise VgenError(
                    f"unknown TokenBridge size {config!r}{nearest(config, SIZES)}; known sizes: {', '.join(SIZES)}"
                )
            config = SIZES[config]
        options = dict(config)
        family, arguments = options.pop("family", "kl"), options.pop("continuous", {})
        return cls.quantize(tokenizer_class(family).from_original(source, arguments), **options).eval()

    from_single_file = from_original

    # -- use -------------------------------------------------------------------------------------------------------

    def encode(self, pixels: Tensor, noise: Any = None) -> Tensor:
        """Pixels as the continuous tokenizer takes them -> levels [B, N, C] int64; noise: of its posterior (None: mode)."""
        return self.quantizer.encode(self.tokenizer.encode(pixels, noise))

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the continuous tokenizer's latents: generators quantise a new sample every epoch."""
        return self.tokenizer.moments(pixels)

    def latents(self, tokens: Tensor) -> Tensor:
        """Levels [..., C] -> the scaled latents [..., C] that they stand for; what TokenBridge's generator reads."""
        return self.quantizer.decode(tokens)

    def decode(
        self,
        tokens: Tensor,
        grid: Grid | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Any = None,
    ) -> Tensor:
        """Levels [B, N, C] -> pixels; all options go to the continuous tokenizer. VgenError for levels out of range."""
        check_tokens(tokens, self.spec.levels)
        return self.tokenizer.decode(self.latents(tokens), grid, condition, steps, guidance, noise)
