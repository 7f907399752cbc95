"""Heads of continuous-token generators: networks that turn what a backbone says about a token into the token, one at a time.

A generator names one of HEADS in its config (`head`) and asks it for its loss and its Prediction:

    diffusion   MAR's: a Gaussian diffusion with a learned variance (arXiv 2406.11838), 100 calls a token
    flow        a rectified flow (arXiv 2209.03003), about 50 calls
    mean_flow   average velocities, trained by splitting intervals (SplitMeanFlow, arXiv 2507.16884): one or two calls

Shapes: n rows (tokens), C channels, D width of the backbone's features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from vgen.errors import VgenError, nearest
from vgen.layers.diffusion_head import DiffusionHead, TimeEmbedding
from vgen.samplers.choice import DiffusionChoice, FlowChoice
from vgen.samplers.diffusion import GaussianDiffusion
from vgen.samplers.diffusion_loss import diffusion_terms
from vgen.samplers.flow import logit_normal_times, noisy
from vgen.samplers.predictions import Diffusion, Flow, MeanFlow, per_token

TIME_SCALE = 1000.0  # flow times are in [0, 1], the sinusoids of the time embedding are made for [0, 1000]


class TokenHead(Protocol):
    """What a generator needs of a head, beside being a module with its network at `net`."""

    choice_kind: type  # of the settings that its Prediction takes

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        weight: Tensor,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """features [n, D], targets [n, C], weight [n] (0: the row does not count) -> loss and figures, means over the rows.

        times: see each head; noise: N(0, 1) [n, C]. What is None is drawn from torch's global generator.
        """

    def prediction(self, features: Tensor) -> Diffusion | Flow | MeanFlow:
        """features [R, B, m, D], one part per guidance row -> the tokens' distribution."""


class TokenDiffusion(nn.Module):
    """MAR's head (equation 2): predicts the noise, and where its variance lies in its range. times: [n] int64 timesteps."""

    choice_kind: ClassVar[type] = DiffusionChoice

    def __init__(self, channels: int, features: int, width: int, layers: int):
        super().__init__()
        self.channels = channels
        self.net = DiffusionHead(channels, features, width, layers)
        self.process = GaussianDiffusion.named("cosine")

    def reset_parameters(self) -> None:
        """MAR's initialisation."""
        self.net.reset_parameters()

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        weight: Tensor,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Squared error of the noise plus the variational bound in bits. See `TokenHead.loss`."""
        if times is None:
            times = torch.randint(len(self.process), (len(targets),), device=targets.device)
        noise = torch.randn_like(targets) if noise is None else noise
        output = self.net(self.process.noised(targets, times, noise), times, features)
        mse, bits = (
            weighted_mean(term, weight) for term in diffusion_terms(self.process, output, targets, noise, times)
        )
        return {"loss": mse + bits, "mse": mse.detach(), "bits": bits.detach()}

    def prediction(self, features: Tensor) -> Diffusion:
        """See `TokenHead.prediction`."""
        return Diffusion(features, self.net, self.process, self.channels)


class TokenFlow(nn.Module):
    """A rectified flow: predicts noise - data. times: [n] in [0, 1], drawn logit-normal (SD3, arXiv 2403.03206, section 3.1).

    mlp: as in `DiffusionHead`.
    """

    choice_kind: ClassVar[type] = FlowChoice

    def __init__(
        self,
        channels: int,
        features: int,
        width: int,
        layers: int,
        mlp: Callable[[], nn.Module | None] = lambda: None,
    ):
        super().__init__()
        self.channels = channels
        self.net = DiffusionHead(channels, features, width, layers, outputs=channels, mlp=mlp)

    def reset_parameters(self) -> None:
        """As MAR's head."""
        self.net.reset_parameters()

    def velocity(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """dx/dt [n, C] at x [n, C], t [n] in [0, 1]."""
        return self.net(x, TIME_SCALE * t, features)

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        weight: Tensor,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Squared error of the velocity. See `TokenHead.loss`."""
        times = logit_normal_times(torch.randn(len(targets), device=targets.device)) if times is None else times
        noise = torch.randn_like(targets) if noise is None else noise
        velocity = self.velocity(noisy(targets, noise, times), times, features)
        loss = weighted_mean(squared_error(velocity, noise - targets), weight)
        return {"loss": loss, "mse": loss.detach()}

    def prediction(self, features: Tensor) -> Flow:
        """See `TokenHead.prediction`."""
        return Flow(per_token(self.velocity, features), features.shape[1], self.channels, features.device)


class IntervalHead(DiffusionHead):
    """DiffusionHead that is told two times: where it stands, and how far the average reaches."""

    def __init__(self, channels: int, features: int, width: int, layers: int):
        super().__init__(channels, features, width, layers, outputs=channels)
        self.span_embed = TimeEmbedding(width)

    def forward(self, x: Tensor, t: Tensor, span: Tensor, features: Tensor) -> Tensor:
        """x [n, C], t and span [n] in timesteps, features [n, D] -> [n, C]."""
        return self.run(x, self.time_embed(t) + self.span_embed(span) + self.cond_embed(features))


class TokenMeanFlow(nn.Module):
    """Average velocities u(x_t, r, t) of a flow over [r, t], learnt without derivatives (SplitMeanFlow, arXiv 2507.16884).

    The identity, from splitting the integral: for any s in [r, t], (t - r) u(x_t, r, t) = (t - s) u(x_t, s, t) + (s - r) u(x_s, r, s) with
    x_s = x_t - (t - s) u(x_t, s, t). Its right side, without gradient, is the target of the left; on a share of the rows
    r = t, where the average is the velocity itself and the target noise - data (the boundary that ties it to the data).
    times: [n, 3] with r <= s <= t in [0, 1]; r = t marks the boundary.
    """

    choice_kind: ClassVar[type] = FlowChoice
    BOUNDARY = 0.5  # share of the rows at the boundary; the paper leaves it open

    def __init__(self, channels: int, features: int, width: int, layers: int):
        super().__init__()
        self.channels = channels
        self.net = IntervalHead(channels, features, width, layers)

    def reset_parameters(self) -> None:
        """As MAR's head."""
        self.net.reset_parameters()
        for index in (0, 2):
            nn.init.normal_(self.net.span_embed.mlp[index].weight, std=0.02)

    def average(self, x: Tensor, t: Tensor, r: Tensor, features: Tensor) -> Tensor:
        """Mean velocity [n, C] from time t [n] down to r [n]."""
        return self.net(x, TIME_SCALE * t, TIME_SCALE * (t - r), features)

    def draw_times(self, rows: int, device: torch.device) -> Tensor:
        """[rows, 3]: r, s, t. Two logit-normal times in order, s uniform between them, or r = s = t on the boundary."""
        pair = logit_normal_times(torch.randn(rows, 2, device=device)).sort(dim=1).values
        share, boundary = torch.rand(2, rows, device=device)
        t = pair[:, 1]
        r = torch.where(boundary < self.BOUNDARY, t, pair[:, 0])
        return torch.stack((r, r + share * (t - r), t), dim=1)

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        weight: Tensor,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Squared error of the average velocity. See `TokenHead.loss`. mse: of the boundary rows, `split`: of the others."""
        r, s, t = (self.draw_times(len(targets), targets.device) if times is None else times).unbind(dim=1)
        noise = torch.randn_like(targets) if noise is None else noise
        x = noisy(targets, noise, t)
        boundary = r == t
        with torch.no_grad():
            first = self.average(x, t, s, features).float()
            second = self.average(x - (t - s)[:, None] * first, s, r, features).float()
            share = ((t - s) / (t - r).clamp_min(1e-6))[:, None]
            target = torch.where(boundary[:, None], noise - targets, share * first + (1 - share) * second)
        error = squared_error(self.average(x, t, r, features), target)
        figures = {"mse": weighted_mean(error.detach(), weight * boundary)}
        figures["split"] = weighted_mean(error.detach(), weight * ~boundary)
        return {"loss": weighted_mean(error, weight), **figures}

    def prediction(self, features: Tensor) -> MeanFlow:
        """See `TokenHead.prediction`."""
        return MeanFlow(per_token(self.average, features), features.shape[1], self.channels, features.device)


HEADS: dict[str, type[TokenDiffusion] | type[TokenFlow] | type[TokenMeanFlow]] = {
    "diffusion": TokenDiffusion,
    "flow": TokenFlow,
    "mean_flow": TokenMeanFlow,
}


def head_kind(name: str) -> type[TokenDiffusion] | type[TokenFlow] | type[TokenMeanFlow]:
    """The class of a name in HEADS."""
    if name not in HEADS:
        raise VgenError(f"a head is one of {', '.join(HEADS)}, got {name!r}{nearest(name, HEADS)}")
    return HEADS[name]


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """[n, C] twice -> means over the channels [n], fp32."""
    return (prediction.float() - target).square().mean(dim=1)


def weighted_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """[n], [n] -> scalar; 0 where no row counts."""
    return (rows * weight).sum() / weight.sum().clamp_min(1e-6)
