"""The two transformers of FlexTok (arXiv 2502.13967, sections 3.1 and 3.2): register encoder and rectified-flow decoder.

Both read [patches of a latent map | registers]. Quirks of the release that a reader would "fix", and that its weights need:
attention logits are scaled by 8 / head_dim (muP; equal to 1/sqrt(head_dim) for the published 64 only); no norm has weights;
nothing is normalised between the last block and the head; the decoder's modulation has its gates first.

Parameter names are those of the published files: `module_dict.<part of the release>.<its parameter>`.

Shapes: B batch, C latent channels, h x w latent map, n = (h/P)(w/P) patches, N registers, D width, d numbers per code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.attention import Mask, attend
from vgen.layers.masks import prefix_mask
from vgen.layers.modulation import Modulation, modulate
from vgen.layers.transformer import Checkpointed, GatedMLP, merge_heads, split_heads

EPS = 1e-5
TIME_PERIOD = 256  # longest period of the time embedding, where others have 10000


def norm(x: Tensor) -> Tensor:
    """LayerNorm without weights over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class Attention(nn.Module):
    """Multi-head self-attention, queries and keys normalised per head, no biases."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.heads = width // head_dim
        self.rescale = 8 / math.sqrt(head_dim)  # on top of attend's 1/sqrt(head_dim): 8 / head_dim together
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        query, key, value = (split_heads(layer(x), self.heads) for layer in (self.wq, self.wk, self.wv))
        attended = attend((norm(query) * self.rescale).to(value.dtype), norm(key).to(value.dtype), value, mask)
        return self.proj(merge_heads(attended))


class EncoderBlock(nn.Module):
    """x += attention(norm x), then x += MLP(norm x)."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.mlp = GatedMLP(width, hidden_width(width))

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.attn(norm(x), mask)
        return x + self.mlp(norm(x))


class DecoderBlock(EncoderBlock):
    """The same with adaLN-zero (arXiv 2212.09748, section 3.2): patches and registers have a modulation each."""

    def __init__(self, width: int, head_dim: int):
        super().__init__(width, head_dim)
        self.adaLN_modulation = Modulation(width, 12)

    def forward(self, x: Tensor, time: Tensor, patches: int) -> Tensor:
        """x [B, n + N, D], time embedding [B, D], patches n -> [B, n + N, D]."""
        parts = rearrange(self.adaLN_modulation(time), "b (kind six d) -> six b kind d", kind=2, six=6)
        gate1, gate2, shift1, scale1, shift2, scale2 = parts  # each [B, 2, D]
        x = x + _by_kind(torch.mul, self.attn(_by_kind(modulate, norm(x), patches, shift1, scale1)), patches, gate1)
        return x + _by_kind(torch.mul, self.mlp(_by_kind(modulate, norm(x), patches, shift2, scale2)), patches, gate2)


def _by_kind(function, x: Tensor, patches: int, *rows: Tensor) -> Tensor:
    """function(x, *rows) with row 0 of each [B, 2, D] for the patches and row 1 for the registers of x."""
    kinds = (x[:, :patches], x[:, patches:])
    return torch.cat([function(part, *(row[:, k : k + 1] for row in rows)) for k, part in enumerate(kinds)], dim=1)


class PatchEmbedding(nn.Module):
    """Patches flattened as (row, column, channel), then one linear layer."""

    def __init__(self, channels: int, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.patch_proj = nn.Linear(channels * patch_size**2, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, h/P, w/P, D]."""
        p = self.patch_size
        if x.shape[2] % p or x.shape[3] % p:
            raise VgenError(
                f"the sides of a latent map must be multiples of the patch size {p}, got {list(x.shape[2:])}"
            )
        return self.patch_proj(rearrange(x, "b c (h p) (w q) -> b h w (p q c)", p=p, q=p))


class PatchHead(nn.Module):
    """Modulated norm, one linear layer, and patches back to a map."""

    def __init__(self, width: int, channels: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.adaLN_modulation = Modulation(width, 2)
        self.proj = nn.Linear(width, channels * patch_size**2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, h/P, w/P, D], time [B, D] -> [B, C, h, w]."""
        shift, scale = self.adaLN_modulation(time)[:, None, None].chunk(2, dim=-1)
        p = self.patch_size
        return rearrange(self.proj(modulate(norm(x), shift, scale)), "b h w (p q c) -> b c (h p) (w q)", p=p, q=p)


class GridPositions(nn.Module):
    """A fixed 2-D sine-cosine table of the largest grid; smaller grids take its top left corner. It is stored in files."""

    def __init__(self, width: int, max_grid: tuple[int, int]):
        super().__init__()
        self.posembs = nn.Parameter(sine_cosine_table(width, max_grid), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, D] -> the same plus positions. Raises VgenError for a grid larger than the table."""
        rows, columns = x.shape[1:3]
        if rows > self.posembs.shape[2] or columns > self.posembs.shape[3]:
            raise VgenError(
                f"this FlexTok has positions for {'x'.join(map(str, self.posembs.shape[2:]))} patches, got {rows}x{columns}; "
                "use a smaller picture"
            )
        return x + rearrange(self.posembs[0, :, :rows, :columns], "d h w -> h w d")


def sine_cosine_table(width: int, grid: tuple[int, int]) -> Tensor:
    """[1, D, rows, columns]: the first half of the channels is the row, the second the column, each [sin | cos]."""
    if width % 4:
        raise VgenError(f"2-D sine-cosine positions need a width that is a multiple of 4, got {width}")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (omega[:, None] * torch.arange(size, dtype=torch.float64) for size in grid)
    row, column = (torch.cat((angle.sin(), angle.cos())) for angle in (row, column))  # [D/2, rows], [D/2, columns]
    table = torch.cat((repeat(row, "d h -> d h w", w=grid[1]), repeat(column, "d w -> d h w", h=grid[0])))
    return table[None].float()


class TimeEmbedding(nn.Module):
    """[cos | sin] of the time at `frequencies / 2` frequencies, then a two-layer MLP."""

    def __init__(self, frequencies: int, width: int, max_time: float):
        super().__init__()
        self.frequencies, self.max_time = frequencies, max_time
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def sinusoid(self, time: Tensor) -> Tensor:
        """Times [B] in [0, max_time] -> [B, F]."""
        half = self.frequencies // 2
        exponent = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angle = time.float()[:, None] * (1000.0 / self.max_time) * TIME_PERIOD**-exponent
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def forward(self, time: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        return self.mlp(self.sinusoid(time).to(self.mlp[0].weight.dtype))


class FlexTokEncoder(Checkpointed, nn.Module):
    """A latent map to N vectors: patches see patches only, register i sees all patches and the registers up to i."""

    def __init__(
        self, channels: int, width: int, depth: int, head_dim: int, patch_size: int, max_grid: tuple[int, int],
        registers: int, code_channels: int,
    ):  # fmt: skip
        super().__init__()
        _check_heads(width, head_dim)
        self.module_dict = nn.ModuleDict(
            {
                "enc_patch_emb": PatchEmbedding(channels, patch_size, width),
                "enc_posemb_module": GridPositions(width, max_grid),
                "enc_register_module": nn.ParameterDict({"registers": nn.Parameter(torch.empty(registers, width))}),
                "enc_transformer": _trunk(EncoderBlock, depth, width, head_dim),
                "enc_to_latents": nn.ModuleDict({"proj": nn.Linear(width, code_channels)}),
            }
        )
        self.gradient_checkpointing = False
        init_weights(self)

    @staticmethod
    def mask(patches: int, registers: int) -> Tensor:
        """[n + N, n + N] bool: bidirectional over the patches, causal over the registers behind them."""
        return prefix_mask((torch.arange(patches + registers) + 1).clamp_min(patches))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, N, d] fp32, what the quantizer gets."""
        parts = self.module_dict
        patches = rearrange(parts.enc_posemb_module(parts.enc_patch_emb(x)), "b h w d -> b (h w) d")
        registers = parts.enc_register_module["registers"]  # without positions: each is learned anyway
        count = len(registers)
        sequence = torch.cat((patches, repeat(registers, "n d -> b n d", b=len(x)).to(patches.dtype)), dim=1)
        mask = self.mask(patches.shape[1], count).to(x.device)
        for block in parts.enc_transformer["blocks"]:
            sequence = self._checkpointed(block, sequence, mask)
        return parts.enc_to_latents["proj"](norm(sequence[:, -count:])).float()


class FlexTokDecoder(Checkpointed, nn.Module):
    """The velocity of a noisy latent map under N codes, of which any number may be kept. Everything sees everything."""

    def __init__(
        self, channels: int, width: int, depth: int, head_dim: int, patch_size: int, max_grid: tuple[int, int],
        registers: int, code_channels: int, frequencies: int, max_time: float,
    ):  # fmt: skip
        super().__init__()
        _check_heads(width, head_dim)
        positions = torch.empty(1, 1, width, registers)  # the channel is axis 2
        self.module_dict = nn.ModuleDict(
            {
                "dec_from_latents": nn.ModuleDict({"proj": nn.Linear(code_channels, width)}),
                "dec_registers_posemb_module": nn.ParameterDict({"posembs": nn.Parameter(positions)}),
                "dec_nested_dropout": nn.ParameterDict({"dropout_mask_token": nn.Parameter(torch.empty(width))}),
                "dec_latent_dropout": nn.ParameterDict({"nullcond": nn.Parameter(torch.empty(width))}),
                "dec_noise_patch_emb": PatchEmbedding(channels, patch_size, width),
                "dec_patches_posemb_module": GridPositions(width, max_grid),
                "dec_time_embedder": TimeEmbedding(frequencies, width, max_time),
                "dec_transformer": _trunk(DecoderBlock, depth, width, head_dim),
                "dec_to_patches": PatchHead(width, channels, patch_size),
            }
        )
        self.gradient_checkpointing = False
        init_weights(self)

    def registers(self, codes: Tensor, keep: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """Codes [B, N, d] -> the registers' inputs [B, N, D], which no substep of the flow changes.

        keep: [B] int64, how many leading codes of each sample count; the others become one learned vector *without
        position*. drop: [B] bool, samples without any condition: all their registers become the null vector.
        """
        parts = self.module_dict
        table = rearrange(parts.dec_registers_posemb_module["posembs"], "1 1 d n -> n d")
        x = parts.dec_from_latents["proj"](codes.to(table.dtype)) + table
        if keep is not None:
            kept = torch.arange(x.shape[1], device=x.device) < keep[:, None]
            x = torch.where(kept[..., None], x, parts.dec_nested_dropout["dropout_mask_token"].to(x.dtype))
        if drop is not None:
            x = torch.where(drop[:, None, None], parts.dec_latent_dropout["nullcond"].to(x.dtype), x)
        return x

    def null_registers(self, batch: int) -> Tensor:
        """[B, N, D]: no condition at all, for guidance."""
        count = self.module_dict.dec_registers_posemb_module["posembs"].shape[-1]
        return repeat(self.module_dict.dec_latent_dropout["nullcond"], "d -> b n d", b=batch, n=count)

    def forward(self, x: Tensor, time: Tensor, registers: Tensor, tap: int = -1) -> tuple[Tensor, Tensor]:
        """Noisy map x [B, C, h, w], times [B], registers [B, N, D] -> velocity [B, C, h, w], features [B, h/P, w/P, D].

        tap: the block whose output for the patches is the second result (REPA reads block 1).
        """
        parts = self.module_dict
        patches = parts.dec_patches_posemb_module(parts.dec_noise_patch_emb(x))
        rows, columns = patches.shape[1:3]
        patches = rearrange(patches, "b h w d -> b (h w) d")
        count = patches.shape[1]
        sequence = torch.cat((patches, registers.to(patches.dtype)), dim=1)
        embedded = parts.dec_time_embedder(time)
        blocks = parts.dec_transformer["blocks"]
        for index, block in enumerate(blocks):
            sequence = self._checkpointed(block, sequence, embedded, count)
            patches = rearrange(sequence[:, :count], "b (h w) d -> b h w d", h=rows, w=columns)
            if index == tap % len(blocks):
                tapped = patches
        return parts.dec_to_patches(patches, embedded), tapped


def hidden_width(width: int) -> int:
    """Hidden width of the gated MLP: 2/3 of 4 times the width, rounded down."""
    return 2 * (4 * width) // 3


def _trunk(block: type[EncoderBlock], depth: int, width: int, head_dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"blocks": nn.ModuleList(block(width, head_dim) for _ in range(depth))})


def _check_heads(width: int, head_dim: int) -> None:
    if width % head_dim:
        raise VgenError(f"width {width} must be a multiple of the head size {head_dim}")


def init_weights(net: FlexTokEncoder | FlexTokDecoder) -> None:
    """Xavier-uniform linear layers; zeros for biases, modulations and the last layer; N(0, 0.02) truncated for tables."""
    heads = {"enc_to_latents.proj", "dec_to_patches.proj"}
    for name, part in net.module_dict.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.weight) if name in heads else nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.ParameterDict):
            for table in part.values():
                nn.init.trunc_normal_(table, std=0.02)
    for part in net.modules():
        if isinstance(part, Modulation):
            part.reset_parameters()
