"""The flow head of Ming-UniVision (arXiv 2510.06590): hidden state of the language model -> one latent, by a rectified flow.

MAR's network with SwiGLU blocks. It predicts data - noise, the negative of a velocity here (`vgen.samplers.flow`, where time
runs from noise, 1, to data, 0). Parameter names are those of the published file, where this is `diffloss`. Shapes: n rows
(tokens), C channels, D width of the features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vgen.layers.diffusion_head import DiffusionHead
from vgen.layers.transformer import FusedSwiGLU
from vgen.models.heads import TIME_SCALE, squared_error, weighted_mean
from vgen.samplers.choice import FlowChoice
from vgen.samplers.flow import noisy
from vgen.samplers.predictions import Flow, per_token
from vgen.tokenizers_vis.mingtok_nets import swiglu_hidden


class MingFlowHead(nn.Module):
    """See the module. channels: C; features: D; width, layers: of the network; ratio: its MLPs are as wide as a SwiGLU of
    `ratio` times the width (the number in `flow_matching_swiglu-4`)."""

    choice_kind: ClassVar[type] = FlowChoice

    def __init__(self, channels: int, features: int, width: int, layers: int, ratio: int = 4):
        super().__init__()
        self.channels = channels
        hidden = swiglu_hidden(width, ratio)
        self.net = DiffusionHead(
            channels, features, width, layers, outputs=channels, mlp=lambda: FusedSwiGLU(width, hidden)
        )

    def reset_parameters(self) -> None:
        """Xavier, zeros where modulations and the output start."""
        self.net.reset_parameters()

    def velocity(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """dx/dt [n, C] at x [n, C], t [n] in [0, 1]."""
        return -self.net(x, TIME_SCALE * t, features)

    def prediction(self, features: Tensor) -> Flow:
        """features [R, B, m, D], one part per guidance row -> the tokens' distribution. All rows share their noise."""
        return Flow(per_token(self.velocity, features), features.shape[1], self.channels, features.device)

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        weight: Tensor | None = None,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the velocity at targets [n, C] (normalised latents), mean over channels, then over rows.

        weight: [n], how much a row counts (None: all alike); times: [n] in [0, 1], uniform in the release's first version (its
        option: the sigmoid of a standard normal); noise: N(0, 1) [n, C]. What is None is drawn from torch's global generator.
        """
        times = torch.rand(len(targets), device=targets.device) if times is None else times
        noise = torch.randn_like(targets) if noise is None else noise
        weight = torch.ones_like(times) if weight is None else weight
        velocity = self.velocity(noisy(targets, noise, times), times, features)
        return weighted_mean(squared_error(velocity, noise - targets), weight)
