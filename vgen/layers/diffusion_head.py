"""The network that denoises one token at a time, given what the backbone says about it (MAR, arXiv 2406.11838, section 4).

A residual MLP whose norms are modulated by timestep + features (adaLN, arXiv 2212.09748). Hi-MAR and MaskGen-KL have the
same head. Parameter names are those of the released files. Shapes: n rows (tokens), C channels, W width of the head.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vgen.layers.modulation import Modulation, modulate
from vgen.layers.sinusoid import cos_sin

EPS = 1e-6
TIME_FEATURES = 256


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a timestep, then two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """[n] -> [n, W]."""
        return self.mlp(cos_sin(t, TIME_FEATURES).to(self.mlp[0].weight.dtype))


class HeadBlock(nn.Module):
    """x += gate · mlp(modulate(norm x)). mlp: None: MAR's two layers."""

    def __init__(self, width: int, mlp: nn.Module | None = None):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=EPS)
        self.mlp = mlp or nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = Modulation(width, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition [n, W] -> [n, W]."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class HeadOutput(nn.Module):
    """A modulated norm without weights, and the projection to the outputs."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition [n, W] -> [n, channels]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiffusionHead(nn.Module):
    """(noisy token, timestep, features) -> the noise in it, and where its variance lies in its range.

    channels: C of a token; features: width of what the backbone gives; width W; layers: number of residual blocks; outputs:
    per token (None: 2 C, as MAR; flows have C); mlp: makes every block's MLP (giving None: MAR's).
    """

    def __init__(
        self,
        channels: int,
        features: int,
        width: int,
        layers: int,
        outputs: int | None = None,
        mlp: Callable[[], nn.Module | None] = lambda: None,
    ):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(features, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width, mlp()) for _ in range(layers))
        self.final_layer = HeadOutput(width, outputs or 2 * channels)

    def reset_parameters(self) -> None:
        """Xavier for linear layers, N(0, 0.02) in the time embedding, zeros in modulations, output and biases (MAR)."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        for index in (0, 2):
            nn.init.normal_(self.time_embed.mlp[index].weight, std=0.02)
        for part in self.modules():
            if isinstance(part, Modulation):
                part.reset_parameters()
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """x [n, C], t [n] in timesteps of the training process, features [n, D] -> [n, 2C] (or `outputs`)."""
        return self.run(x, self.time_embed(t) + self.cond_embed(features))

    def run(self, x: Tensor, condition: Tensor) -> Tensor:
        """The blocks alone: x [n, C] in any float dtype, condition [n, W]."""
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)
