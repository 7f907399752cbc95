"""The flow head of Ming-UniVision (arXiv 2510.06590): hidden state of the language model -> one latent, by a rectified flow.

MAR's network with SwiGLU blocks. It predicts data - noise, the negative of a velocity here (`vgen.samplers.flow`, where time
runs from noise, 1, to data, 0). Parameter names are those of the published file, where this is `diffloss`. Shapes: n rows
(tokens), C channels, D width of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgen.layers.transformer import FusedSwiGLU
from vgen.models.mar.heads import TokenFlow
from vgen.tokenizers_vis.mingtok.nets import swiglu_hidden


class MingFlowHead(TokenFlow):
    """See the module. channels: C; features: D; width, layers: of the network; ratio: its MLPs are as wide as a SwiGLU of
    `ratio` times the width (the number in `flow_matching_swiglu-4`)."""

    def __init__(self, channels: int, features: int, width: int, layers: int, ratio: int = 4):
        hidden = swiglu_hidden(width, ratio)
        super().__init__(channels, features, width, layers, mlp=lambda: FusedSwiGLU(width, hidden))

    def velocity(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """dx/dt [n, C] at x [n, C], t [n] in [0, 1]: the network predicts its negative."""
        return -super().velocity(x, t, features)

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        weight: Tensor | None = None,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Squared error of the velocity at targets [n, C] (normalised latents). See `TokenHead.loss`.

        weight None: all rows count alike; times: [n] in [0, 1], drawn uniform as in the release's first version (its option: the
        sigmoid of a standard normal).
        """
        times = torch.rand(len(targets), device=targets.device) if times is None else times
        weight = torch.ones_like(times) if weight is None else weight
        return super().loss(features, targets, weight, times, noise)
