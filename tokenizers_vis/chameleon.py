"""Chameleon's VQGAN (arXiv 2405.09818; Lumina-mGPT decodes through it): a taming VQGAN with attention in the middle only.

Its sequence models know a code as a word of their text vocabulary: `image_token_ids` reads which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError
from vgen.layers.conv import Decoder, Encoder
from vgen.layers.taming import rename_taming
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import CodeTokenizer, TokenSpec
from vgen.tokenizers_vis.maskgit_vqgan import Codebook
from vgen.tokenizers_vis.quantizers import Quantized, with_bookkeeping

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
LOSSES = ("loss.",)  # discriminator and perceptual network of the training checkpoint


@dataclass(frozen=True)
class ChameleonOutput:
    """A training forward: reconstruction [B, 3, H, W] in [-1, 1], not clamped, and what the quantizer said."""

    reconstruction: Tensor
    quantized: Quantized


class ChameleonVQGAN(NamedSizes, CodeTokenizer, ModelMixin, ConfigMixin):
    """Encoder, Euclidean codebook, decoder; any sides that are multiples of the downsampling.

    ch: base width; ch_mult: width multipliers, finest level first; num_res_blocks: per level (one more in the decoder);
    z_channels: width between the convolutional nets and the codebook; n_embed x embed_dim: the codebook; num_groups: of
    every GroupNorm; usage_window: length of the usage queue (0: none, as in the published file).
    """

    SIZES = SIZES
    coding_parts = ("encoder", "quant_conv", "quantize")  # what decides about the tokens of a picture

    @register_to_config
    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        n_embed: int = 8192,
        embed_dim: int = 256,
        num_groups: int = 32,
        usage_window: int = 0,
    ):
        super().__init__()
        options = {"attention_levels": (), "groups": num_groups}
        self.encoder = Encoder(3, ch, ch_mult, num_res_blocks, z_channels, **options)
        self.decoder = Decoder(z_channels, ch, ch_mult, num_res_blocks, 3, **options)
        self.quantize = Codebook(n_embed, embed_dim, window=usage_window)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        factor = 2 ** (len(ch_mult) - 1)
        self.spec = TokenSpec(downsample=(1, factor, factor), vocabulary=n_embed)

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "512"
    ) -> ChameleonVQGAN:
        """A model from vqgan.ckpt (or the folder of Meta's release that holds it), or from its state dict.

        config: a size of SIZES or keyword arguments. Raises VgenError when the file is no such checkpoint or its shapes
        do not fit the config.
        """
        if isinstance(source, Mapping):
            state = dict(source)
        else:
            path = Path(source)
            state = read_state_dict(path / WEIGHTS if path.is_dir() else path)
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        state = rename_taming(state, len(model.config.ch_mult))
        load_exactly(model, with_bookkeeping(model, state), ignore=LOSSES)
        return model.eval()

    from_single_file = from_original

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> what the quantizer gets: [B, C, h, w]."""
        return self.quant_conv(self.encoder(pixels))

    def forward(self, pixels: Tensor) -> ChameleonOutput:
        """[B, 3, H, W] in [-1, 1] -> reconstruction and quantizer losses (the losses in train mode only)."""
        quantized = self.quantize(self.features(pixels))
        return ChameleonOutput(self.reconstruct(quantized.quantized), quantized)

    def code_vectors(self, tokens: Tensor) -> Tensor:
        """Codes [...] -> code vectors [..., C]."""
        return self.quantize.embedding(tokens)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """[B, C, h, w] code vectors -> [B, 3, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(vectors.to(self.post_quant_conv.weight.dtype)))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive GAN weight looks at: the decoder's last convolution."""
        return self.decoder.conv_out.weight


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
