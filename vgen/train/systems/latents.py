"""What training does about a tokenizer's latent, beside reconstructing: losses, figures, warnings, rescue of unused codes.

`Codes` for discrete tokenizers, `Gaussians` for continuous ones with a posterior, `Points` for those without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Generator, Tensor

from vgen.samplers.types import grid_size
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian
from vgen.tokenizers_vis.losses.objectives import Regularised, WeightedKL
from vgen.train.system import autocast

ACTIVE = 0.01  # variance over pictures from which on a latent number says something (arXiv 1509.00519, section 5.2)


def latent_kind(config: Any, model: ModelMixin) -> Codes | Gaussians | Points:
    """The right one for a tokenizer."""
    if model.spec.vocabulary is not None:
        return Codes(config, model)
    return Gaussians(config, model) if hasattr(model, "posterior") else Points(config)


class Codes:
    """A codebook: how much of it is in use, and the revival of unused codes."""

    def __init__(self, config: Any, model: ModelMixin):
        self.config, self.model = config, model
        self.tokens = grid_size(model.spec.grid(config.data.size, config.data.size))

    def draws(self, batch: int, generator: Generator) -> dict[str, Tensor]:
        """Random arguments of the tokenizer's forward: none."""
        return {}

    def regulariser(self, output: Any) -> Regularised:
        """What the latent adds to the objective: the quantizer's losses."""
        return output.quantized

    def logs(self, output: Any) -> dict[str, Tensor]:
        """Figures of a training step."""
        return {} if output.quantized.usage is None else {"usage": output.quantized.usage}

    @torch.no_grad()
    def after_step(self, step: int, pixels: Tensor, average: Mapping[str, Tensor]) -> list[str]:
        """Revives unused codes and says when the codebook has collapsed. pixels: of the step at hand."""
        config, quantizer, messages = self.config, self.model.quantize, []
        done, every = step + 1, config.loss.restart_every
        if every and done % every == 0 and done <= config.loss.restart_until * config.steps:
            seen = done * config.accumulate * pixels.shape[0] * self.tokens
            if seen >= quantizer.codebook_used.numel():
                messages += self._revive(pixels, average)
        # Every codebook looks collapsed in its first steps; what counts is whether it recovers.
        started = done >= 0.1 * config.steps
        if started and done % config.log_every == 0 and (collapse := quantizer.collapsed()):
            messages.append(f"warning: {collapse}")
        return messages

    def _revive(self, pixels: Tensor, average: Mapping[str, Tensor]) -> list[str]:
        quantizer, weight = self.model.quantize, self.model.quantize.embedding.weight
        before = weight.clone()
        with autocast(self.config, weight.device):
            features = self.model.features(pixels)
        rows = features.float().movedim(1, -1).flatten(0, -2)
        # torch's global generator is seeded for this step on every process, so a resumed run revives the same codes.
        count = quantizer.restart_dead_codes(rows)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(weight, 0)  # features differ between processes, weights must not
        changed = (weight != before).any(dim=1)
        if "quantize.embedding.weight" in average:
            average["quantize.embedding.weight"][changed] = weight[changed].float()
        return [f"revived {count} unused codes of {quantizer.codes}"] if count else []

    def record(self, output: Any) -> Tensor:
        """What `figures` needs of a forward: the codes."""
        return output.quantized.indices.flatten()

    def figures(self, records: list[Tensor]) -> dict[str, float]:
        """Codes in use and dead on held-out pictures, and exp(entropy) of their histogram."""
        counts = torch.bincount(torch.cat(records), minlength=self.model.spec.vocabulary).double()
        used = float((counts > 0).sum())
        perplexity = torch.special.entr(counts / counts.sum()).sum().exp()
        return {"codes_used": used, "codes_dead": len(counts) - used, "code_perplexity": perplexity.item()}

    def finish(self, model: ModelMixin, pixels: Tensor) -> None:
        """Nothing to do to a finished model."""


class Gaussians:
    """A posterior: its distance from the prior, and how many of its numbers carry anything."""

    def __init__(self, config: Any, model: ModelMixin):
        self.config = config
        self.shape = (model.spec.channels, *model.spec.grid(config.data.size, config.data.size)[1:])
        self.latest: Tensor | None = None  # nats a picture in the step at hand

    def draws(self, batch: int, generator: Generator) -> dict[str, Tensor]:
        """Random arguments of the tokenizer's forward: the noise of the posterior sample."""
        return {"noise": torch.randn(batch, *self.shape, generator=generator, device=generator.device)}

    def regulariser(self, output: Any) -> Regularised:
        """What the latent adds to the objective: the weighted KL divergence."""
        return WeightedKL(output.posterior, self.config.loss.kl_weight)

    def logs(self, output: Any) -> dict[str, Tensor]:
        """Figures of a training step. kl_nats: a picture's, not weighted."""
        posterior = output.posterior
        self.latest = posterior.kl().detach().mean()
        mean, std = _moments(posterior.mean.detach(), posterior.log_variance.detach())
        return {"kl_nats": self.latest, "latent_mean": mean, "latent_std": std}

    def after_step(self, step: int, pixels: Tensor, average: Mapping[str, Tensor]) -> list[str]:
        """Says when the posterior has collapsed to the prior."""
        done = step + 1
        if done % self.config.log_every or done < 0.1 * self.config.steps or self.latest.item() >= 1:
            return []
        return [
            f"warning: the posterior has collapsed to the prior ({self.latest.item():.2g} nats a picture): the latents say "
            "nothing; lower loss.kl_weight"
        ]

    def record(self, output: Any) -> tuple[Tensor, Tensor]:
        """What `figures` needs of a forward: mean and log-variance."""
        return output.posterior.mean, output.posterior.log_variance

    def figures(self, records: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Nats a picture, mean and standard deviation of the latents, and the share of their numbers that carry something."""
        means, log_variances = (torch.cat(parts).flatten(1) for parts in zip(*records))
        nats = DiagonalGaussian(means, log_variances).kl().mean()
        mean, std = _moments(means, log_variances)
        active = (means.var(dim=0) > ACTIVE).float().mean()
        values = {"kl_nats": nats, "latent_mean": mean, "latent_std": std, "latent_active": active}
        return {name: value.item() for name, value in values.items()}

    def finish(self, model: ModelMixin, pixels: Tensor) -> None:
        """Gives the model the scale of its latents on these pictures, which generators rely on."""
        model.eval().calibrate(pixels)


class Points:
    """Latents without a posterior [B, N, C], `tokens` of a forward's output: their scale, and whether they tell pictures apart."""

    def __init__(self, config: Any):
        self.config = config
        self.latest: Tensor | None = None  # share of the variance that lies between the pictures of the step at hand

    def logs(self, output: Any) -> dict[str, Tensor]:
        """Figures of a training step."""
        found = _spread(output.tokens.detach().float())
        self.latest = found["latent_between"]
        return found

    def after_step(self, step: int) -> list[str]:
        """Says when latents hardly differ from picture to picture."""
        done, config = step + 1, self.config
        if (
            config.batch_size < 2
            or done % config.log_every
            or done < 0.1 * config.steps
            or self.latest.item() >= ACTIVE
        ):
            return []
        return [
            f"warning: only {self.latest.item():.2%} of the latents' variance lies between pictures: they say next to nothing; lower the "
            "learning rate, or lengthen the warm-up"
        ]

    def record(self, output: Any) -> Tensor:
        """What `figures` needs of a forward: the latents."""
        return output.tokens.float()

    def figures(self, records: list[Tensor]) -> dict[str, float]:
        """Mean and standard deviation of the latents, and the share of their variance that lies between pictures."""
        return {name: value.item() for name, value in _spread(torch.cat(records)).items()}

    def finish(self, model: ModelMixin, pixels: Tensor) -> None:
        """Gives the model the scale of its latents on these pictures, which generators rely on."""
        model.eval().calibrate(pixels)


def _moments(mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of samples of the posteriors."""
    return mean.mean(), (mean.var() + log_variance.exp().mean()).sqrt()


def _spread(latents: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of latents [B, N, C], and the share of their variance that lies between pictures."""
    std, mean = torch.std_mean(latents)
    between = latents.var(dim=0, correction=0).mean() / std.square()
    return {"latent_mean": mean, "latent_std": std, "latent_between": between}
