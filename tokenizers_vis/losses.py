"""Training objectives of a VQ tokenizer (VQGAN, arXiv 2012.09841, eqs. 5-7, as LlamaGen sets them)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import VgenError, nearest
from vgen.tokenizers_vis.quantizers import Quantized


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


class VQLoss(nn.Module):
    """Generator and discriminator objectives around a discriminator and a perceptual distance (either may be None).

    Weights multiply their terms. disc_start: first step (steps count from 1) at which the GAN terms count; before it the
    discriminator does not run at all. disc_adaptive_weight: scale the GAN term so that its gradient at the decoder's last layer is
    as large as that of the reconstruction (VQGAN eq. 7). perceptual: maps two picture batches to distances [B, 1, 1, 1].
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

    def adversarial(self, step: int) -> bool:
        """Whether the GAN terms count at this step: if not, the discriminator needs no optimizer step either."""
        return self.discriminator is not None and self.disc_weight > 0 and step >= self.disc_start

    def generator(
        self,
        pixels: Tensor,
        reconstruction: Tensor,
        quantized: Quantized,
        step: int,
        last_layer: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms of the autoencoder's objective; "loss" is what to differentiate, the others are unweighted and detached.

        pixels, reconstruction: [B, 3, H, W]. last_layer: the decoder's last weight, needed by the adaptive weight only.
        The discriminator receives no gradient.
        """
        pixels, reconstruction = pixels.float(), reconstruction.float()
        terms = {"reconstruction": self._reconstruct(reconstruction, pixels)}
        fidelity = self.reconstruction_weight * terms["reconstruction"]
        if self.perceptual_weight:
            terms["perceptual"] = self.perceptual_loss(pixels, reconstruction).mean()
            fidelity = fidelity + self.perceptual_weight * terms["perceptual"]
        loss = fidelity + quantized.vq + quantized.commit + quantized.entropy
        if self.adversarial(step):
            with _frozen(self.discriminator):
                terms["adversarial"] = self._gen_loss(self.discriminator(reconstruction).float())
            weight = self.disc_weight
            if self.disc_adaptive_weight:
                weight = weight * self._adaptive_weight(fidelity, terms["adversarial"], last_layer)
            loss = loss + weight * terms["adversarial"]
        terms |= {"vq": quantized.vq, "commit": quantized.commit, "entropy": quantized.entropy}
        return {"loss": loss} | {name: value.detach() for name, value in terms.items()}

    def discriminate(self, pixels: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """Terms of the discriminator's objective: "loss" (zero and constant before disc_start) and mean logits.

        Call it after `generator`, with that step's reconstruction: BatchNorm sees the batches in the published order.
        """
        if not self.adversarial(step):
            return {"loss": pixels.new_zeros((), dtype=torch.float32)}
        real = self.discriminator(pixels).float()
        fake = self.discriminator(reconstruction.detach()).float()
        loss = self.disc_weight * self._disc_loss(real, fake)
        return {"loss": loss, "real": real.detach().mean(), "fake": fake.detach().mean()}

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
