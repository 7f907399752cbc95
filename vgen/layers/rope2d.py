"""Two- and four-coordinate rotary tables of the LlamaGen family: LlamaGen, PAR, NAR, ZipAR, ARPG, RandAR, DAR.

A table is [rows, D/2, 2]: cos and sin of every channel pair of a head of size D; pair j rotates the channels 2j, 2j + 1
(interleaved, unlike MM-RoPE). Rows of conditions are all zero, cos included: their queries and keys become zero vectors
and act through their values only. A reader would "fix" that; every published checkpoint of the family depends on it.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError


def rope2d_table(height: int, width: int, head_dim: int, base: float = 10000.0, prefix: int = 0) -> Tensor:
    """Table [prefix + height * width, head_dim/2, 2] fp32: the first half of the pairs turns with the row, the rest
    with the column.

    prefix: zero rows for condition tokens in front. Source: LlamaGen (arXiv 2406.06525), spec section on 2-D rope.
    """
    frequencies = _frequencies(head_dim, base)
    rows = _angles(torch.arange(height), frequencies)
    columns = _angles(torch.arange(width), frequencies)
    return take_rows(_grid_table(rows, columns), torch.cat((torch.full((prefix,), -1), torch.arange(height * width))))


def rope2d_coarse(height: int, width: int, head_dim: int, stride: tuple[int, int], base: float = 10000.0) -> Tensor:
    """Table [height * width, head_dim/2, 2] of a map whose tokens cover `stride` (rows, columns) cells of a finer grid each.

    A token stands at the centre of what it covers; stride (1, 1) is `rope2d_table`. Ours, for the coarse scales of xAR.
    """
    frequencies = _frequencies(head_dim, base)
    rows, columns = (
        _angles((torch.arange(length) + 0.5) * step - 0.5, frequencies) for length, step in zip((height, width), stride)
    )
    return _grid_table(rows, columns)


def rope2d_extrapolated(
    height: int,
    width: int,
    head_dim: int,
    factor: float,
    boundary: int,
    base: float = 10000.0,
    prefix: int = 0,
) -> Tensor:
    """RandAR's table for a grid `factor` times as large as in training (arXiv 2412.01827, released code).

    The `boundary` highest frequencies use positions 0 … side - 1 (extrapolation), the others the positions of the small
    grid stretched to the same end points (interpolation). Shapes as `rope2d_table`.
    """
    frequencies = _frequencies(head_dim, base)

    def angles(side: int) -> Tensor:
        stretched = _angles(torch.linspace(0, int(side / factor) - 1, side), frequencies[boundary:])
        return torch.cat((_angles(torch.arange(side), frequencies[:boundary]), stretched), dim=1)

    table = _grid_table(angles(height), angles(width))
    return take_rows(table, torch.cat((torch.full((prefix,), -1), torch.arange(height * width))))


def rope4d_table(current: Tensor, target: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """DAR's table [T, head_dim/2, 2] fp32 (arXiv 2503.11129): angles of the current and of the predicted token's cell.

    current, target: [T, 2] (row, column) of each input token and of the token it predicts. The pairs are four equal
    groups: current row, current column, target row, target column.
    """
    if head_dim % 8:
        raise VgenError(f"4D-RoPE needs a head size that is a multiple of 8 (four groups of pairs), got {head_dim}")
    exponent = torch.arange(head_dim // 8, dtype=torch.float64) * 8 / head_dim
    frequencies = base**-exponent
    coordinates = torch.cat((current, target), dim=1).double()  # [T, 4]
    angles = rearrange(coordinates[:, :, None] * frequencies, "t c f -> t (c f)")
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]`, zero where rows is -1: a permuted table with the zero rows of conditions and learned tokens.

    table [N, D/2, 2], rows [...] int64 -> [..., D/2, 2].
    """
    return table[rows.clamp(min=0)] * (rows >= 0)[..., None, None].to(table)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Rotates heads x [B, H, N, D] by a table [N, D/2, 2] or [B, N, D/2, 2]; fp32 inside, cast back."""
    cos, sin = rearrange(table, "... n d two -> two ... 1 n d", two=2)
    even, odd = rearrange(x.float(), "... (d two) -> two ... d", two=2)
    return rearrange([even * cos - odd * sin, odd * cos + even * sin], "two ... d -> ... (d two)").to(x.dtype)


def _frequencies(head_dim: int, base: float) -> Tensor:
    """[head_dim / 4] fp32, shared by rows and columns."""
    if head_dim % 4:
        raise VgenError(
            f"2-D rope needs a head size that is a multiple of 4 (pairs for rows and columns), got {head_dim}"
        )
    half = head_dim // 2
    return 1.0 / base ** (torch.arange(0, half, 2).float() / half)


def _angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[side, number of frequencies]."""
    return positions.float()[:, None] * frequencies


def _grid_table(rows: Tensor, columns: Tensor) -> Tensor:
    """Angles of the rows [H, F] and columns [W, F] -> table [H * W, 2F, 2]."""
    height, width = len(rows), len(columns)
    angles = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1)
    return rearrange(torch.stack((angles.cos(), angles.sin()), dim=-1), "h w f two -> (h w) f two")
