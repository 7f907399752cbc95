"""MM-RoPE: rotary positions for text and visual tokens in one sequence (Lumos-1, arXiv 2507.08801, section 3.2).

The frequencies are dealt to the axes in groups of 16 (time 4, height 6, width 6), so that every axis sees the whole
spectrum. Text tokens use one coordinate for all frequencies, which makes them plain 1-D RoPE. Channels are half-rotated:
channel i pairs with i + head_dim/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError

AXES = "tttthhwwhhwwhhww"  # axis of frequency j is AXES[j % 16]
SCALE = (4, 8, 8)  # positions are measured in frames and pixels of a 4x8x8 tokenizer: constants of the model class


def frequency_axes(head_dim: int) -> Tensor:
    """Axis (0 time, 1 height, 2 width) of each of the head_dim/2 frequencies: [head_dim/2] int64."""
    if head_dim % 32:
        raise VgenError(f"MM-RoPE needs a head size that is a multiple of 32 (16 frequencies a group), got {head_dim}")
    return torch.tensor(["thw".index(a) for a in AXES]).repeat(head_dim // 32)


def rope_tables(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_dim] fp32 of positions [..., 3] (time, height, width)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / theta**exponent  # [head_dim/2]
    angles = positions.float()[..., frequency_axes(head_dim).to(positions.device)] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates x [B, H, N, D] by tables [B, N, D] (or [N, D]); fp32 inside, cast back."""
    cos, sin = (rearrange(t, "... n d -> ... 1 n d") for t in tables)
    low, high = x.float().chunk(2, dim=-1)
    return (torch.cat((low, high), dim=-1) * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def text_positions(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Positions of text: index i on all three axes, [length, 3]."""
    return torch.arange(length, device=device)[:, None].expand(-1, 3)


def visual_positions(coordinates: Tensor, offset: Tensor) -> Tensor:
    """Positions of visual tokens: offset + (4 frame, 8 row, 8 column).

    coordinates: [N, 3] or [B, N, 3] grid coordinates; offset: [B], the sequence index of the first visual token of the
    first frame. Returns [B, N, 3]. The offset is not advanced for later frames: frames differ only by 4 in time.
    """
    return offset[:, None, None] + coordinates * torch.tensor(SCALE, device=coordinates.device)


@dataclass(frozen=True)
class FrameLayout:
    """The token ids that delimit frames in a Lumos sequence: start, height, width, rows of codes ..., end.

    patch: pixels per size unit (32); stride: pixels per token (8); time_stride: frames per latent frame (4).
    """

    image_start: int
    image_end: int
    size_zero: int
    patch: int = 32
    stride: int = 8
    time_stride: int = 4


def sequence_positions(ids: Tensor, layout: FrameLayout) -> tuple[Tensor, Tensor]:
    """Positions of a whole Lumos sequence. ids [L] -> (positions [L, 3], content flag [L]).

    Content is what lies between a frame's width token and its end token: rows of codes, each closed by a new-line token
    (a column of its own). Rows and columns are read from the size tokens, so masked new-lines do not matter.
    """
    positions = text_positions(len(ids), ids.device).clone()
    content = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    starts = (ids == layout.image_start).nonzero().flatten().tolist()
    tokens_per_unit = layout.patch // layout.stride
    for frame, start in enumerate(starts):
        rows, columns = ((int(ids[start + i]) - layout.size_zero) * tokens_per_unit for i in (1, 2))
        first = start + 3
        span = slice(first, first + rows * (columns + 1))
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns + 1), indexing="ij")
        step = torch.stack(
            (torch.full_like(row, layout.time_stride * frame), layout.stride * row, layout.stride * column), dim=-1
        )
        positions[span] = starts[0] + 3 + step.flatten(0, 1).to(ids.device)
        content[span] = True
    return positions, content
