"""The network that denoises a whole grid of tokens at once: a small DiT (arXiv 2212.09748) in the place of MAR's per-token
MLP, so that tokens of one step see each other (Hi-MAR, arXiv 2505.20288, section 3.3).

A token's condition is the timestep plus what the backbone says about its place; it modulates every block token by token.
Parameter names are those of the released files. Shapes: n pictures, L tokens of C channels, W width of the head, D of the
backbone's features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.diffusion_head import HeadOutput, TimeEmbedding
from vgen.layers.modulation import ModulatedBlock, Modulation, SelfAttention
from vgen.layers.sinusoid import sin_cos
from vgen.layers.transformer import GeluMLP


class PointConv(nn.Module):
    """A linear layer per token, in the files a 1 x 1 convolution."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, L, channels] -> [n, L, width]."""
        return F.linear(x.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class GridHead(nn.Module):
    """(noisy grid, timestep, features of all its places) -> the noise in it. The variance is not predicted.

    size: (height, width) of the grid; channels: C; features: D; width: W, a multiple of 4 and of the heads; layers, heads: of the blocks; mlp_ratio: hidden
    width of their MLPs over W. Raises VgenError for sizes that do not divide.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        features: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if width % 4 or width % heads:
            raise VgenError(f"the width of a grid head must be a multiple of 4 and of its {heads} heads, got {width}")
        self.x_embedder = PointConv(channels, width)
        self.c_embedder = PointConv(features, width)
        self.t_embedder = TimeEmbedding(width)
        table = grid_positions(size, width)[None]
        self.register_buffer("pos_embed", table)
        # Nothing reads this one: the released files have it, always zero.
        self.register_buffer("c_pos_embed", torch.zeros_like(table))
        self.blocks = nn.ModuleList(
            ModulatedBlock(
                SelfAttention(width, heads, bias=True),
                GeluMLP(width, int(width * mlp_ratio), approximate="tanh"),
                affine=False,
            )
            for _ in range(layers)
        )
        self.final_layer = HeadOutput(width, channels)

    def reset_parameters(self) -> None:
        """Xavier, N(0, 0.02) in the time embedding, zeros in modulations and output; c_embedder keeps PyTorch's own, as released."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        nn.init.xavier_uniform_(
            self.x_embedder.proj.weight.flatten(1)
        )  # a view: fans of a matrix, not of a convolution
        nn.init.zeros_(self.x_embedder.proj.bias)
        self.c_embedder.proj.reset_parameters()
        for index in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[index].weight, std=0.02)
        for part in self.modules():
            if isinstance(part, Modulation):
                part.reset_parameters()
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """x [n, L, C], t [n] in timesteps of the training process, features [n, L, D] -> [n, L, C]."""
        condition = self.t_embedder(t)[:, None] + self.c_embedder(features)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, block.adaLN_modulation(condition), None)
        return self.final_layer(x, condition)


def grid_positions(size: tuple[int, int], width: int) -> Tensor:
    """[H * W, width] sines and cosines of the place: the first half of the channels tells the *column*, the rest the row (as released)."""
    height, columns = size
    place = torch.arange(height * columns)
    return torch.cat((sin_cos(place % columns, width // 2), sin_cos(place // columns, width // 2)), dim=1)
