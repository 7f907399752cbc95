"""The two vision transformers of TiTok (arXiv 2406.07550, section 3.2): picture -> N latents, and N latents -> patches.

Both see one flat sequence, without a mask: [cls, patches, latents] in the encoder, [cls, mask tokens, latents (, text)] in the
decoder. Parameter names are those of the published files.
Shapes: B batch, W width, g x g patches of a side of g, N latents, C channels of a latent, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.attention import attend
from vgen.layers.transformer import Checkpointed, merge_heads, split_heads


class Attention(nn.Module):
    """Multi-head self-attention, every token to every token; one packed projection to queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise VgenError(f"width {width} must be a multiple of the {heads} heads")
        self.heads = heads
        # Parameters, not a linear layer: so they are named in the files, and initialised as torch does (Xavier, not 0.02).
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, W] -> [B, n, W]."""
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (split_heads(part, self.heads) for part in packed.chunk(3, dim=-1))
        return self.out_proj(merge_heads(attend(query, key, value)))


class MLP(nn.Module):
    """c_proj(gelu(c_fc x)), exact GELU, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, W] -> [B, n, W]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """x += attention(norm x), then x += MLP(norm x). LayerNorm eps 1e-5."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, W] -> [B, n, W]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ViT(Checkpointed, nn.Module):
    """What encoder and decoder share: cls, position tables and blocks.

    shape: (width, layers, heads); side: g; tokens: N.
    """

    def __init__(self, shape: Sequence[int], side: int, tokens: int):
        super().__init__()
        width, layers, heads = shape
        self.gradient_checkpointing = False
        self.class_embedding = _table(1, width)
        self.positional_embedding = _table(side**2 + 1, width)
        self.latent_token_positional_embedding = _table(tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def image_tokens(self, patches: Tensor) -> Tensor:
        """[B, g*g, W] -> [B, 1 + g*g, W]: cls in front, positions added."""
        cls = repeat(self.class_embedding, "one w -> b one w", b=patches.shape[0]).to(patches)
        return torch.cat((cls, patches), dim=1) + self.positional_embedding.to(patches)

    def run(self, x: Tensor) -> Tensor:
        """Norm and blocks over the whole sequence [B, n, W]."""
        x = self.ln_pre(x)
        for block in self.transformer:
            x = self._checkpointed(block, x)
        return x


class Encoder(ViT):
    """Pixels in [0, 1] to the features of N latents. image_size, patch_size: sides in pixels."""

    def __init__(self, shape: Sequence[int], image_size: int, patch_size: int, tokens: int, out_channels: int):
        super().__init__(shape, patch_side(image_size, patch_size), tokens)
        self.patch_embed = nn.Conv2d(3, shape[0], patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(shape[0], out_channels, 1)

    def features(self, pixels: Tensor, queries: Tensor) -> Tensor:
        """[B, 3, H, W], latent queries [N, W] -> [B, N, W]."""
        image = self.image_tokens(rearrange(self.patch_embed(pixels), "b w h v -> b (h v) w"))
        latents = (queries + self.latent_token_positional_embedding).to(image)
        x = self.run(torch.cat((image, repeat(latents, "n w -> b n w", b=len(image))), dim=1))
        return self.ln_post(x[:, -len(queries) :])

    def project(self, features: Tensor) -> Tensor:
        """[B, N, W] -> [B, C, 1, N], what quantizer or posterior get."""
        return self.conv_out(rearrange(features, "b n w -> b w 1 n"))

    def project_reinterpreted(self, features: Tensor) -> Tensor:
        """`project` of the first models, which read each sample's [N, W] numbers as a [W, N] matrix, *without transposing*.

        So a "latent" mixes numbers of all latents. It looks like a mistake (and was one), but their weights were trained with it.
        """
        batch, tokens, width = features.shape
        return self.conv_out(features.reshape(batch, width, 1, tokens))


class Decoder(ViT):
    """N latents, and optionally a caption's features, to one vector per patch. text_tokens: T (0: no text)."""

    def __init__(
        self,
        shape: Sequence[int],
        image_size: int,
        patch_size: int,
        tokens: int,
        in_channels: int,
        text_tokens: int = 0,
        text_width: int = 768,
    ):
        side, width = patch_side(image_size, patch_size), shape[0]
        super().__init__(shape, side, tokens)
        self.side = side
        self.text_shape = (text_tokens, text_width) if text_tokens else None
        self.mask_token = _table(1, 1, width)
        self.decoder_embed = nn.Linear(in_channels, width)
        if text_tokens:
            self.text_guidance_proj = nn.Linear(text_width, width)
            self.text_guidance_positional_embedding = _table(text_tokens, width)

    def patches(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """Latents [B, C, 1, N] (, text features [B, T, text_width]) -> [B, W, g, g]. VgenError: text missing, unasked, misshapen."""
        self._check_text(text, len(latents))
        tokens = self.decoder_embed(rearrange(latents, "b c 1 n -> b n c").to(self.decoder_embed.weight.dtype))
        masks = repeat(self.mask_token, "1 1 w -> b m w", b=len(tokens), m=self.side**2).to(tokens)
        sequence = [self.image_tokens(masks), tokens + self.latent_token_positional_embedding.to(tokens)]
        if text is not None:  # after the latents; padding is visible
            projected = self.text_guidance_proj(text.to(self.text_guidance_proj.weight.dtype))
            sequence.append(projected + self.text_guidance_positional_embedding.to(projected))
        x = self.run(torch.cat(sequence, dim=1))[:, 1 : 1 + self.side**2]
        return rearrange(self.ln_post(x), "b (h v) w -> b w h v", h=self.side)

    def _check_text(self, text: Tensor | None, batch: int) -> None:
        if self.text_shape is None and text is not None:
            raise VgenError("this TiTok's decoder takes no text (only TA-TiTok's does); leave condition out")
        if self.text_shape is not None and (text is None or text.shape != (batch, *self.text_shape)):
            found = "none" if text is None else list(text.shape)
            raise VgenError(
                f"a text-aware decoder needs the caption's CLIP features as condition, {[batch, *self.text_shape]}, got {found}; "
                'for no caption pass the features of ""'
            )


class PixelDecoder(Decoder):
    """Decoder whose patches become pixels around [0, 1], not clamped, by a linear map and a 3x3 convolution across borders."""

    def __init__(
        self,
        shape: Sequence[int],
        image_size: int,
        patch_size: int,
        tokens: int,
        in_channels: int,
        text_tokens: int = 0,
        text_width: int = 768,
    ):
        super().__init__(shape, image_size, patch_size, tokens, in_channels, text_tokens, text_width)
        self.patch_size = patch_size
        self.ffn = nn.Sequential(nn.Conv2d(shape[0], 3 * patch_size**2, 1))
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """[B, C, 1, N] (, [B, T, text_width]) -> [B, 3, H, W]."""
        patches = self.ffn(self.patches(latents, text))
        # Colours vary fastest within a patch: not the channel order of F.pixel_shuffle.
        return self.conv_out(rearrange(patches, "b (p q c) h v -> b c (h p) (v q)", p=self.patch_size, c=3))


class ProxyDecoder(Decoder):
    """Decoder whose patches become logits over the codes of another tokenizer."""

    def __init__(
        self, shape: Sequence[int], image_size: int, patch_size: int, tokens: int, in_channels: int, codes: int
    ):
        super().__init__(shape, image_size, patch_size, tokens, in_channels)
        width = shape[0]
        self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, codes, 1))

    def forward(self, latents: Tensor, text: None = None) -> Tensor:
        """[B, C, 1, N] -> logits [B, codes, g, g]."""
        return self.ffn(self.patches(latents, text))


def initialise(module: nn.Module) -> None:
    """Truncated normal 0.02 for linear layers and convolutions, zero biases (released code); tables keep theirs."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def patch_side(image_size: int, patch_size: int) -> int:
    """Patches along a side. VgenError when they do not fill it."""
    if image_size % patch_size:
        raise VgenError(
            f"image_size {image_size} must be a multiple of the patch size {patch_size}; "
            f"use {image_size // patch_size * patch_size} or {(image_size // patch_size + 1) * patch_size}"
        )
    return image_size // patch_size


def _table(*shape: int) -> nn.Parameter:
    """N(0, 1 / W), the initialisation of every learned token and position."""
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)
