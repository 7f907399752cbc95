"""What TiTok is trained with (specs/titok.md, sections 2.3 and 5): codebook, discriminator, objectives, moving average."""

from __future__ import annotations

import re
from typing import Any

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker
from torch import Tensor, nn

from vgen.checkpoints import load_exactly
from vgen.tokenizers_vis.latents.online_clustering import OnlineClusteringQuantizer
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian
from vgen.tokenizers_vis.latents.quantizers import Quantized, VectorQuantizer
from vgen.tokenizers_vis.losses.objectives import VQLoss, WeightedKL
from vgen.tokenizers_vis.losses.patchgan import BlurDiscriminator
from vgen.train.optim import Average


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries under `name.`, without it."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


@checker("titok.quantizer")
def check_quantizer(fixture: Fixture) -> None:
    config = fixture.config
    for mode in config["modes"]:
        weights, out = part_of(fixture.weights, mode), part_of(fixture.outputs, mode)
        kind = OnlineClusteringQuantizer if "embed_prob" in weights else VectorQuantizer
        quantizer = kind(
            config["codebook_size"], config["token_size"], "l2" in mode, config["commitment_cost"], window=0
        )
        load_exactly(quantizer, {name: value.clone() for name, value in weights.items()})
        z = fixture.inputs["z"].clone().requires_grad_()
        found = quantizer.train()(z)
        assert_equal(found.indices[:, None], out["indices"], f"{mode} indices")
        assert_close(found.quantized, out["z_q"], what=f"{mode} z_q")
        assert_close(found.commit, out["commitment"], what=f"{mode} commitment loss")
        assert_close(found.vq, out["codebook"], what=f"{mode} codebook loss")
        (found.quantized.square().sum() + found.vq + found.commit).backward()
        assert_close(z.grad, out["grad_z"], what=f"{mode} gradient of z")
        if "grad_codebook" in out:
            assert_close(quantizer.embedding.weight.grad, out["grad_codebook"], what=f"{mode} gradient of the codebook")
        if "embed_prob_after" in out:
            assert_close(quantizer.embed_prob, out["embed_prob_after"], what="running shares")
            assert_close(quantizer.embedding.weight, out["embedding_after"], what="codebook after clustering")
        soft = quantizer.soft_lookup(part_of(fixture.inputs, mode)["soft"])
        assert_close(soft, out["entry_soft"], what=f"{mode} soft lookup")


class MeanDifference(nn.Module):
    """Stands in the fixture for the perceptual network."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean()


def objective(fixture: Fixture) -> VQLoss:
    config, losses = fixture.config, fixture.config["losses"]
    options = config["discriminator"]
    discriminator = BlurDiscriminator(
        options["num_channels"], options["hidden_channels"], options["num_stages"], options["blur_kernel"]
    )
    load_exactly(
        discriminator, {key: value.clone() for key, value in part_of(fixture.weights, "discriminator").items()}
    )
    factor = losses["discriminator_factor"]
    loss = VQLoss(
        discriminator,
        MeanDifference(),
        reconstruction_loss=losses["reconstruction_loss"],
        reconstruction_weight=losses["reconstruction_weight"],
        perceptual_weight=losses["perceptual_weight"],
        disc_weight=factor * losses["discriminator_weight"],
        disc_own_weight=factor,
        disc_start=losses["discriminator_start"],
        lecam_weight=losses["lecam_regularization_weight"],
    )
    loss.lecam.real.fill_(config["ema_real_init"])
    loss.lecam.fake.fill_(config["ema_fake_init"])
    return loss


def latents(fixture: Fixture) -> dict[str, Any]:
    """Name of a mode -> what its latent adds to the objective."""
    losses, real = fixture.config["losses"], fixture.inputs["real"]
    quantizer_loss = losses["quantizer_weight"] * fixture.config["quantizer_loss"]
    return {
        "vq": Quantized(real, real, commit=torch.tensor(quantizer_loss)),
        "vae": WeightedKL(DiagonalGaussian.from_moments(fixture.inputs["moments"]), losses["kl_weight"]),
    }


@checker("titok.losses")
def check_losses(fixture: Fixture) -> None:
    real, fake, config = fixture.inputs["real"], fixture.inputs["fake"], fixture.config
    judge = objective(fixture).discriminator
    with torch.no_grad():
        assert_close(judge(real), fixture.outputs["disc_logits_real"], what="logits of real pictures")
        assert_close(judge(fake), fixture.outputs["disc_logits_fake"], what="logits of reconstructions")
    for mode, latent in latents(fixture).items():
        check_objectives(objective(fixture), mode, latent, real, fake, part_of(fixture.outputs, mode), config)
    check_average(fixture)


def check_objectives(
    loss: VQLoss, mode: str, latent: Any, real: Tensor, fake: Tensor, out: dict[str, Tensor], config: dict[str, Any]
) -> None:
    kl = {"vae": "kl_loss", "vq": "quantizer_loss"}[mode]
    for step in sorted(int(name.rpartition("step")[2]) for name in out if name.startswith("gen_total_step")):
        terms = loss.generator(real, fake, latent, step)
        adversarial = terms.get("adversarial", torch.zeros(()))  # absent before disc_start
        expected = {
            "gen_total": terms["loss"],
            "gan_loss": adversarial,
            "weighted_gan_loss": loss.disc_weight * adversarial,
            "reconstruction_loss": config["losses"]["reconstruction_weight"] * terms["reconstruction"],
            "perceptual_loss": config["losses"]["perceptual_weight"] * terms["perceptual"],
            kl: sum(latent.losses().values()),
        }
        for name, value in expected.items():
            assert_close(value, out[f"{name}_step{step}"], what=f"{mode} {name} at step {step}")
    for call in sorted(int(name.rpartition("_")[2]) for name in out if name.startswith("disc_total_")):
        terms = loss.discriminate(real, fake, config["losses"]["discriminator_start"])
        assert_close(terms["loss"], out[f"disc_total_{call}"], what=f"{mode} discriminator loss, call {call}")
        assert_close(terms["lecam"], out[f"lecam_{call}"], what=f"{mode} LeCam, call {call}")
        assert_close(loss.lecam.real[None], out[f"ema_real_{call}"], what=f"{mode} running mean of real, call {call}")
        assert_close(loss.lecam.fake[None], out[f"ema_fake_{call}"], what=f"{mode} running mean of fake, call {call}")


def check_average(fixture: Fixture) -> None:
    """Our average starts as the weights and theirs as a copy of the first update: the same from the second update on."""
    trace = fixture.outputs["ema_trace"]
    network = nn.Module()
    network.weight = nn.Parameter(trace[0].clone())
    average = Average(network, float(re.search(r"decay=(0\.\d+)", fixture.notes).group(1)))
    increment = trace[0].clone()  # the parameter starts at zero, and its first increment is (1) * increment
    with torch.no_grad():
        for step, expected in enumerate(trace[1:], start=1):
            network.weight += (step + 1) * increment
            average.update(step)
            assert_close(average.values["weight"], expected, what=f"moving average after update {step + 1}")
    for step, expected in zip(fixture.config["ema_decay_steps"], fixture.outputs["ema_decay"]):
        if step > 1:
            network.weight.data.zero_()
            average.values["weight"].fill_(1.0)
            average.update(step - 1)
            assert_close(average.values["weight"][0], expected, what=f"decay of update {step}")
