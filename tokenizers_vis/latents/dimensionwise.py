"""Post-training dimension-wise quantisation (TokenBridge, arXiv 2503.16430): every channel of a latent on its own.

The levels are the means of 2 ** bits equally likely bins of a standard normal. Nothing is learnt, and one table serves all channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vgen.errors import VgenError


class DimensionwiseQuantizer(nn.Module):
    """Floats <-> levels 0 … 2 ** bits - 1, elementwise.

    levels: their number where it is no power of two; low, high: range of the floats (outside it they are clamped);
    std_range: standard deviations that the range stands for.
    The map from the range to the normal is linear, so the outermost levels lie well inside it: at ±4.06 for the published
    ±5, 3 deviations and 6 bits. Buffers have the names of the published generators, whose fp32 tables differ from a fresh
    computation by a few 1e-6 (cancellation in the tails): load theirs where there are any.
    """

    def __init__(
        self, bits: int = 6, low: float = -5.0, high: float = 5.0, std_range: float = 3.0, levels: int | None = None
    ):
        super().__init__()
        levels = 2**bits if levels is None else levels
        if levels < 2 or not low < high or std_range <= 0:
            raise VgenError(
                "dimension-wise quantisation needs at least 1 bit (2 levels), low < high and a positive std_range, "
                f"got levels={levels}, low={low:g}, high={high:g}, std_range={std_range:g}"
            )
        self.low, self.high, self.std_range = low, high, std_range
        boundaries, values = _normal_bins(levels, std_range)
        self.register_buffer("boundaries", boundaries)  # [levels + 1]: part of the files, not used for anything
        self.register_buffer("reconstruction_values", values)  # [levels]

    @property
    def levels(self) -> int:
        """Number of values per channel."""
        return len(self.reconstruction_values)

    def encode(self, x: Tensor) -> Tensor:
        """Floats [...] -> levels [...] int64: the nearest reconstruction value, *not* the bin that the float lies in.

        As an argmin over all levels, the first of equally near ones, without a [..., levels] tensor.
        """
        normal = (x.float() - self.low) / (self.high - self.low) * (2 * self.std_range) - self.std_range
        normal = normal.clamp(-self.std_range, self.std_range).contiguous()
        # Sorted, because bins of no width have the value 0 wherever they are. The sort is stable and searches find the first
        # of equal values, so that `order` maps to the first of equal levels.
        values, order = self.reconstruction_values.float().sort(stable=True)
        above = torch.searchsorted(values, normal).clamp(max=len(values) - 1)
        below = torch.searchsorted(values, values[(above - 1).clamp(min=0)])
        to_above, to_below = (normal - values[above]).abs(), (normal - values[below]).abs()
        first, second = order[below], order[above]
        nearer = torch.where(to_below < to_above, first, second)
        return torch.where(to_below == to_above, torch.minimum(first, second), nearer)

    def decode(self, levels: Tensor) -> Tensor:
        """Levels [...] -> floats [...], fp32."""
        normal = self.reconstruction_values.float()[levels]
        return (normal + self.std_range) / (2 * self.std_range) * (self.high - self.low) + self.low


def _normal_bins(levels: int, std_range: float) -> tuple[Tensor, Tensor]:
    """Boundaries [levels + 1] and means [levels] of equally likely bins of N(0, 1), cut off at ± std_range.

    In fp32 and from the textbook formula, because the published tables are. Where both boundaries of a bin were cut off
    (many levels) its mean is 0. On the CPU, so that a model on the meta device has them.
    """
    shares = torch.arange(levels + 1, dtype=torch.float64, device="cpu") / levels
    boundaries = torch.special.ndtri(shares).clamp(-std_range, std_range).float()
    density = torch.exp(-0.5 * boundaries**2) / math.sqrt(2 * math.pi)
    cumulative = 0.5 * (1 + torch.erf(boundaries / math.sqrt(2)))
    mass = cumulative.diff()
    return boundaries, -density.diff() / torch.where(mass == 0, 1e-10, mass)


def low_frequencies_first(latents: Tensor) -> list[int]:
    """The channels of latent maps [n, C, h, w] by rising mean frequency: an order for generators that make them one by one.

    The mean frequency of a channel is that of its power spectrum over the maps, without the constant. TokenBridge puts low
    frequencies first, and its order for the KL-16 is a constant of the code: this is our reading for other tokenizers.
    """
    rows, columns = latents.shape[-2:]
    power = torch.fft.fft2(latents.float()).abs().square().mean(dim=0)  # [C, h, w]
    vertical, horizontal = torch.fft.fftfreq(rows), torch.fft.fftfreq(columns)
    frequency = (vertical.square()[:, None] + horizontal.square()).sqrt().to(power)
    power[:, 0, 0] = 0
    mean = (power * frequency).sum(dim=(1, 2)) / power.sum(dim=(1, 2)).clamp_min(1e-30)
    return mean.argsort(stable=True).tolist()
