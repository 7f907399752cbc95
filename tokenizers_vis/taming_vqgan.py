"""VQGANs of taming-transformers (arXiv 2012.09841, section 3.1): convolutional nets with attention where the picture is small.

One class reads every file of that kind: the ImageNet f16 models of 1024 and 16384 codes (attention at 16 x 16), the f8 model with
the Gumbel quantizer of the same repository, Chameleon's (attention in the middle only), and what people trained with that code or
with that of latent diffusion (LDM). Published files are PyTorch Lightning checkpoints; their `loss.*` (discriminator, LPIPS) is
left aside. What a file is, its names and shapes say: `from_original` needs no config, and takes the model's YAML as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
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
from vgen.layers.conv import Decoder, Encoder
from vgen.layers.taming import rename_taming, taming_facts
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import CodeTokenizer, TokenSpec
from vgen.tokenizers_vis.latents.quantizers import Quantized, with_bookkeeping
from vgen.tokenizers_vis.maskgit_vqgan import Codebook

# Keyword arguments of TamingVQGAN, after the configs in the repository: ddconfig, n_embed and embed_dim. attn_resolutions [16] of
# 256 px is the coarsest of five levels, [32] the coarsest of four.
SIZES: dict[str, dict[str, Any]] = {
    "imagenet-f16-1024": {"n_embed": 1024, "attention_levels": (4,)},
    "imagenet-f16-16384": {"n_embed": 16384, "attention_levels": (4,)},
    "gumbel-f8-8192": {"ch_mult": (1, 1, 2, 4), "attention_levels": (3,), "gumbel": True},
}
LOSSES = ("loss.",)  # discriminator and perceptual network of the training checkpoint
WEIGHTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class VQGANOutput:
    """A training forward: reconstruction [B, 3, H, W] in [-1, 1], not clamped, and what the quantizer said."""

    reconstruction: Tensor
    quantized: Quantized


class GumbelCodebook(nn.Module):
    """The code whose logit is largest (DALL-E's quantizer, arXiv 2102.12092, section 2.1). In training its gradient is that of
    the softmax; the original adds Gumbel noise to the logits, also when it codes pictures, which vgen does not."""

    def __init__(self, codes: int, channels: int, features: int):
        super().__init__()
        self.proj = nn.Conv2d(features, codes, 1)
        self.embed = nn.Embedding(codes, channels)

    @property
    def embedding(self) -> nn.Embedding:
        """The codebook, under the name that the other quantizers have for it."""
        return self.embed

    def forward(self, z: Tensor) -> Quantized:
        """[B, C, h, w] -> Quantized."""
        logits = self.proj(z)
        indices = logits.argmax(dim=1)
        chosen = rearrange(self.embed(indices), "b h w c -> b c h w")
        if self.training:
            mixture = torch.einsum("b k h w, k c -> b c h w", logits.softmax(dim=1), self.embed.weight)
            chosen = mixture + (chosen - mixture).detach()
        return Quantized(chosen, rearrange(indices, "b h w -> b (h w)"))


class TamingVQGAN(NamedSizes, CodeTokenizer, Exported, ModelMixin, ConfigMixin):
    """Encoder, codebook, decoder; any sides that are multiples of the downsampling.

    ch: base width; ch_mult: width multipliers, finest level first; num_res_blocks: per level (one more in the decoder);
    z_channels: width between the convolutional nets and the codebook; n_embed x embed_dim: the codebook; num_groups: of
    every GroupNorm; usage_window: length of the usage queue (0: none, as in published files); attention_levels: levels (0 finest,
    -1 coarsest) with attention after every ResBlock, in the encoder and the decoder; double_z: the encoder makes 2 z_channels;
    gumbel: `GumbelCodebook` in the place of the nearest code.
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
        attention_levels: Sequence[int] = (),
        double_z: bool = False,
        gumbel: bool = False,
    ):
        super().__init__()
        options, features = {"attention_levels": attention_levels, "groups": num_groups}, z_channels * (1 + double_z)
        self.encoder = Encoder(3, ch, ch_mult, num_res_blocks, features, **options)
        self.decoder = Decoder(z_channels, ch, ch_mult, num_res_blocks, 3, **options)
        if gumbel:
            self.quantize = GumbelCodebook(n_embed, embed_dim, z_channels)
        else:
            self.quantize = Codebook(n_embed, embed_dim, window=usage_window)
        self.quant_conv = nn.Conv2d(features, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        factor = 2 ** (len(ch_mult) - 1)
        self.spec = TokenSpec(downsample=(1, factor, factor), vocabulary=n_embed)

    # -- construction ----------------------------------------------------------------------------------------------

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Path | Mapping[str, Any] | None = None
    ) -> TamingVQGAN:
        """A model from a checkpoint file, a folder with one, or a state dict.

        config: a size of SIZES, keyword arguments, the model's YAML file, or None: what names and shapes say (`config_of`).
        Raises VgenError when the file is no such checkpoint or its shapes do not fit the config.
        """
        state = source if isinstance(source, Mapping) else read_state_dict(weights_file(source))
        state = {key: value for key, value in state.items() if not key.startswith(LOSSES)}
        if config is None:
            config = config_of(state)
        elif isinstance(config, Path) or (isinstance(config, str) and config.endswith((".yaml", ".yml"))):
            config = config_from_yaml(config)
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        state = rename_taming(state, len(model.config.ch_mult))
        load_exactly(model, with_bookkeeping(model, state))
        return model.eval()

    from_single_file = from_original

    # -- use -------------------------------------------------------------------------------------------------------

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> what the quantizer gets: [B, C, h, w]."""
        return self.quant_conv(self.encoder(pixels))

    def forward(self, pixels: Tensor) -> VQGANOutput:
        """[B, 3, H, W] in [-1, 1] -> reconstruction and quantizer losses (the losses in train mode only)."""
        quantized = self.quantize(self.features(pixels))
        return VQGANOutput(self.reconstruct(quantized.quantized), quantized)

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


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of TamingVQGAN for a file under its own names. Raises VgenError for a file of another family."""
    facts = asdict(taming_facts(state))
    gumbel = "quantize.embed.weight" in state
    name = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    if name not in state:
        raise VgenError(
            f"this VQGAN has no codebook: expected {name}, found "
            f"{', '.join(key for key in state if key.startswith('quant')) or 'no quantizer'}"
            + (
                "; with double_z it is an autoencoder of latents (LDM), which KLModel reads"
                if facts["double_z"]
                else ""
            )
        )
    if facts["attention_levels"] != facts.pop("decoder_attention"):
        raise VgenError("this VQGAN attends at other levels in its decoder than in its encoder, which vgen's does not")
    codes, width = state[name].shape
    return {**facts, "n_embed": codes, "embed_dim": width, "gumbel": gumbel}


def config_from_yaml(path: str | Path) -> dict[str, Any]:
    """Keyword arguments of TamingVQGAN from a model's YAML (`model.params` with `ddconfig`, `n_embed`, `embed_dim`)."""
    path = Path(path)
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        params = model["params"]
        nets = params["ddconfig"]
        sides = [nets["resolution"] // 2**level for level in range(len(nets["ch_mult"]))]
        found = {
            "ch": nets["ch"],
            "ch_mult": tuple(nets["ch_mult"]),
            "num_res_blocks": nets["num_res_blocks"],
            "z_channels": nets["z_channels"],
            "double_z": bool(nets.get("double_z", True)),  # the default of the original's encoder
            "attention_levels": tuple(level for level, side in enumerate(sides) if side in nets["attn_resolutions"]),
            "n_embed": params["n_embed"],
            "embed_dim": params["embed_dim"],
            "gumbel": str(model.get("target", "")).endswith("GumbelVQ"),
        }
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise VgenError(
            f"{path} is no config of a VQGAN ({type(error).__name__}: {' '.join(str(error).split())}); expected model.params with "
            "ddconfig, n_embed and embed_dim, or leave it out: the file's names and shapes say the same"
        ) from error
    return found


def weights_file(source: str | Path) -> Path:
    """`source`, or the one checkpoint in a folder. Raises VgenError when a folder has none, or several."""
    path = Path(source)
    if not path.is_dir():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise VgenError(f"{path} must hold one checkpoint ({', '.join(WEIGHTS)}), found {names}; name the file")
    return found[0]
