"""Training objectives of a tokenizer (VQGAN, arXiv 2012.09841, eqs. 5-7, as LlamaGen and TiTok set them)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import VgenError, nearest
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 [mean relu(1 - real) + mean relu(1 + fake)]."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 [mean softplus(-real) + mean softplus(fake)]."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """LlamaGen's loss of that name. The arguments are swapped (constants as logits, logits as targets): kept, because it is
    what the option means in their code; `vanilla` is the loss that was intended."""
    return 0.5 * (_swapped_bce(1.0, real) + _swapped_bce(0.0, fake))


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean(fake)."""
    return -fake.mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """LlamaGen's loss of that name, with the same swapped arguments as its discriminator's."""
    return _swapped_bce(1.0, fake)


def _swapped_bce(constant: float, output: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(torch.full_like(output, constant), output)


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_discriminator,
    "vanilla": vanilla_discriminator,
    "non-saturating": non_saturating_discriminator,
}
GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": hinge_generator,
    "non-saturating": non_saturating_generator,
}
RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


class Regularised(Protocol):
    """What a tokenizer's latent adds to the objective: `Quantized`, `WeightedKL`."""

    def losses(self) -> dict[str, Tensor]:
        """Weighted scalars by name."""


@dataclass(frozen=True)
class WeightedKL:
    """weight times the KL divergence of the posterior from N(0, 1), in nats a picture, mean over the batch."""

    posterior: DiagonalGaussian
    weight: float

    def losses(self) -> dict[str, Tensor]:
        """The term as "kl"."""
        return {"kl": self.weight * self.posterior.kl().mean()}


class LeCam(nn.Module):
    """relu(mean D(real) - m_fake)^2 + relu(m_real - mean D(fake))^2 with running means m (arXiv 2104.03310, eq. 3).

    Keeps the discriminator's verdicts from drifting apart when there is little data. The means move after they are used.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits of real and of reconstructed pictures -> scalar."""
        real, fake = real.mean(), fake.mean()
        loss = F.relu(real - self.fake).square() + F.relu(self.real - fake).square()
        with torch.no_grad():
            self.real.lerp_(real.detach(), 1 - self.decay)
            self.fake.lerp_(fake.detach(), 1 - self.decay)
        return loss


class VQLoss(nn.Module):
    """Generator and discriminator objectives around a discriminator and a perceptual distance (either may be None).

    Weights multiply their terms. disc_start: first step (steps count from 1) at which the GAN terms count; before it the
    discriminator does not run at all. disc_adaptive_weight: scale the GAN term so that its gradient at the decoder's last layer is
    as large as that of the reconstruction (VQGAN eq. 7). disc_own_weight: of the discriminator's own objective (None: disc_weight,
    as in LlamaGen; TiTok has 1). lecam_weight: of `LeCam`, in the discriminator's objective alone.
    perceptual: maps two picture batches to distances [B, 1, 1, 1].
    """

    def __init__(
        self,
        discriminator: nn.Module | None = None,
        perceptual: nn.Module | None = None,
        *,
        reconstruction_loss: str = "l2",
        reconstruction_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        disc_loss: str = "hinge",
        gen_loss: str = "hinge",
        disc_weight: float = 0.5,
        disc_start: int = 20000,
        disc_adaptive_weight: bool = False,
        disc_own_weight: float | None = None,
        lecam_weight: float = 0.0,
    ):
        super().__init__()
        self.discriminator = discriminator
        self.perceptual_loss = perceptual
        self._reconstruct = _choose(RECONSTRUCTION_LOSSES, reconstruction_loss, "reconstruction_loss")
        self._disc_loss = _choose(DISCRIMINATOR_LOSSES, disc_loss, "disc_loss")
        self._gen_loss = _choose(GENERATOR_LOSSES, gen_loss, "gen_loss")
        self.reconstruction_weight = reconstruction_weight
        self.perceptual_weight = perceptual_weight if perceptual is not None else 0.0
        self.disc_weight, self.disc_start = disc_weight, disc_start
        self.disc_adaptive_weight = disc_adaptive_weight
        self.disc_own_weight = disc_weight if disc_own_weight is None else disc_own_weight
        self.lecam_weight = lecam_weight
        self.lecam = LeCam() if lecam_weight else None

    def adversarial(self, step: int) -> bool:
        """Whether the GAN terms count at this step: if not, the discriminator needs no optimizer step either."""
        return self.discriminator is not None and self.disc_weight > 0 and step >= self.disc_start

    def generator(
        self,
        pixels: Tensor,
        reconstruction: Tensor,
        latent: Regularised,
        step: int,
        last_layer: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms of the autoencoder's objective; "loss" is what to differentiate, the others are detached.

        Those of the latent are weighted, the others are not. pixels, reconstruction: [B, 3, H, W]. last_layer: the decoder's last weight, needed by the adaptive weight only.
        The discriminator receives no gradient.
        """
        pixels, reconstruction = pixels.float(), reconstruction.float()
        terms = {"reconstruction": self._reconstruct(reconstruction, pixels)}
        fidelity = self.reconstruction_weight * terms["reconstruction"]
        if self.perceptual_weight:
            terms["perceptual"] = self.perceptual_loss(pixels, reconstruction).mean()
            fidelity = fidelity + self.perceptual_weight * terms["perceptual"]
        regularisation = latent.losses()
        loss = sum(regularisation.values(), start=fidelity)
        if self.adversarial(step):
            with _frozen(self.discriminator):
                terms["adversarial"] = self._gen_loss(self.discriminator(reconstruction).float())
            weight = self.disc_weight
            if self.disc_adaptive_weight:
                weight = weight * self._adaptive_weight(fidelity, terms["adversarial"], last_layer)
            loss = loss + weight * terms["adversarial"]
        return {"loss": loss} | {name: value.detach() for name, value in (terms | regularisation).items()}

    def discriminate(self, pixels: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """Terms of the discriminator's objective: "loss" (zero and constant before disc_start), mean logits, and how many of the
        logits are on the right side of zero.

        Call it after `generator`, with that step's reconstruction: BatchNorm sees the batches in the published order.
        """
        if not self.adversarial(step):
            return {"loss": pixels.new_zeros((), dtype=torch.float32)}
        real = self.discriminator(pixels).float()
        fake = self.discriminator(reconstruction.detach()).float()
        terms = {"loss": self.disc_own_weight * self._disc_loss(real, fake)}
        if self.lecam is not None:
            lecam = self.lecam_weight * self.lecam(real, fake)
            terms = {"loss": terms["loss"] + lecam, "lecam": lecam.detach()}
        terms |= {"real": real.detach().mean(), "fake": fake.detach().mean()}
        right = {"real_accuracy": real.detach() > 0, "fake_accuracy": fake.detach() < 0}
        return terms | {name: verdict.float().mean() for name, verdict in right.items()}

    def _adaptive_weight(self, fidelity: Tensor, adversarial: Tensor, last_layer: Tensor | None) -> Tensor:
        if last_layer is None:
            raise VgenError("disc_adaptive_weight needs the decoder's last weight; pass last_layer=model.last_layer")
        (by_fidelity,) = torch.autograd.grad(fidelity, last_layer, retain_graph=True)
        (by_adversary,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        return (by_fidelity.norm() / (by_adversary.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def _choose(table: dict[str, Callable], name: str, option: str) -> Callable:
    if name not in table:
        raise VgenError(f"{option} must be one of {', '.join(table)}, got {name!r}{nearest(name, table)}")
    return table[name]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through `module` but do not reach its parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
