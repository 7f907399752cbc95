"""Tokenizer losses: the GAN table, the start of the GAN, perceptual distances."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vgen.errors import VgenError
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian
from vgen.tokenizers_vis.latents.quantizers import Quantized
from vgen.tokenizers_vis.losses.objectives import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, LeCam, VQLoss, WeightedKL
from vgen.tokenizers_vis.losses.patchgan import BlurDiscriminator, BlurPool, PatchDiscriminator
from vgen.tokenizers_vis.losses.perceptual import LPIPS, ConvNeXtDistance, PyramidLoss, WeightedMean

ZERO = torch.zeros(())
CODES = Quantized(ZERO, ZERO, ZERO, ZERO, ZERO)


def test_discriminator_losses_at_known_points():
    zero = torch.zeros(4)
    assert DISCRIMINATOR_LOSSES["hinge"](zero, zero).item() == 1.0
    assert DISCRIMINATOR_LOSSES["hinge"](zero + 2, zero - 2).item() == 0.0
    assert DISCRIMINATOR_LOSSES["vanilla"](zero, zero).item() == pytest.approx(math.log(2))


def test_the_discriminator_rests_before_its_start_and_learns_after():
    torch.manual_seed(0)
    loss = VQLoss(PatchDiscriminator(width=4, layers=1), disc_start=10)
    pixels, made = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16, requires_grad=True)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    early = loss.generator(pixels, made, CODES, step=9)
    assert early["loss"].item() == pytest.approx(F.mse_loss(made, pixels).item())
    assert loss.discriminate(pixels, made, step=9)["loss"].item() == 0
    assert all(torch.equal(before[k], v) for k, v in loss.state_dict().items())
    late = loss.generator(pixels, made, CODES, step=10)
    assert late["loss"].item() == pytest.approx((late["reconstruction"] + 0.5 * late["adversarial"]).item())
    late["loss"].backward()
    assert all(p.grad is None and p.requires_grad for p in loss.discriminator.parameters())
    made.grad = None
    loss.discriminate(pixels, made, step=10)["loss"].backward()
    assert made.grad is None and all(p.grad is not None for p in loss.discriminator.parameters())


def test_the_adaptive_weight_balances_gradients():
    torch.manual_seed(0)
    weight = torch.randn(3, 3, 1, 1, requires_grad=True)
    pixels = torch.rand(2, 3, 16, 16)
    made = F.conv2d(pixels, weight)
    options = {"disc_start": 0, "disc_weight": 1.0}
    torch.manual_seed(1)
    adaptive = VQLoss(PatchDiscriminator(width=4, layers=1), disc_adaptive_weight=True, **options)
    found = adaptive.generator(pixels, made, CODES, 1, weight)
    gan = found["loss"] - F.mse_loss(made, pixels)
    (by_gan,) = torch.autograd.grad(gan, weight, retain_graph=True)
    (by_fidelity,) = torch.autograd.grad(F.mse_loss(made, pixels), weight, retain_graph=True)
    assert by_gan.norm().item() == pytest.approx(by_fidelity.norm().item(), rel=0.05)
    with pytest.raises(VgenError, match="last_layer"):
        adaptive.generator(pixels, made, CODES, 1)


def test_unknown_loss_names_are_refused():
    with pytest.raises(VgenError, match=r"hinge, vanilla.*did you mean 'hinge'"):
        VQLoss(disc_loss="hinged")


@pytest.mark.parametrize("distance", [PyramidLoss(levels=2), LPIPS((2, 3, 4, 4, 4)).eval()])
def test_perceptual_distances_are_zero_for_equals_and_grow_with_damage(distance):
    generator = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(2, 3, 8, 8, generator=generator), size=32, mode="bilinear") * 2 - 1
    noise = torch.randn(2, 3, 32, 32, generator=generator)
    if isinstance(distance, LPIPS):
        for name, parameter in distance.named_parameters():
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) - (0.5 if ".slice" in name else 0.0))
    same, little, much = (distance(x, y) for y in (x, x + 0.05 * noise, x + 0.5 * noise))
    assert same.shape == (2, 1, 1, 1) and same.abs().max() < 1e-6
    assert (little > 0).all() and (little < much).all()


def test_pyramid_loss_prefers_sharp_to_blurred_at_equal_error():
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(4, 3, 64, 64, generator=generator) > 0.5).float() - 0.5
    x = F.interpolate(x[..., :16, :16], size=64, mode="nearest")
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    shifted = x + (x - blurred).square().mean().sqrt()  # the same mean squared error, edges intact
    assert F.mse_loss(blurred, x).item() == pytest.approx(F.mse_loss(shifted, x).item(), rel=1e-3)
    distance = PyramidLoss()
    assert distance(x, blurred).mean() > 1.2 * distance(x, shifted).mean()
    with pytest.raises(VgenError, match="at least 32 px"):
        distance(x[..., :16, :16], x[..., :16, :16])


def test_lpips_reads_the_two_published_files(tmp_path):
    with torch.device("meta"):
        keys = LPIPS().state_dict()
    fill = torch.Generator().manual_seed(0)
    vgg, heads = {"classifier.0.weight": torch.zeros(1)}, {}
    for key, value in keys.items():
        tensor = torch.zeros(value.shape) if "512, 512" in str(value.shape) else torch.rand(value.shape, generator=fill)
        if key.startswith("net."):
            vgg["features." + key.split(".", 2)[2]] = tensor
        elif key.startswith("lin"):
            heads[key] = tensor
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    loaded = LPIPS.from_files(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    assert torch.equal(loaded.net.slice3[1].weight, vgg["features.10.weight"])
    assert torch.equal(loaded.lin2.model[1].weight, heads["lin2.model.1.weight"])
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.scaling_layer.shift[0, 2].item() == pytest.approx(-0.188)


def test_the_weighted_divergence_of_the_prior_itself_is_zero():
    zero = torch.zeros(2, 3, 1, 4)
    prior, off = DiagonalGaussian(zero, zero), DiagonalGaussian(zero + 1, zero)
    assert WeightedKL(prior, 0.1).losses()["kl"].item() == 0
    assert WeightedKL(off, 0.1).losses()["kl"].item() == pytest.approx(0.1 * 12 / 2)


def test_the_discriminators_own_weight_and_verdicts():
    torch.manual_seed(0)
    pixels, made = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    judge = PatchDiscriminator(width=4, layers=1).eval()
    weighted, own = (VQLoss(judge, disc_start=0, disc_weight=0.1, disc_own_weight=weight) for weight in (None, 1.0))
    low, full = (loss.discriminate(pixels, made, 1) for loss in (weighted, own))
    assert full["loss"].item() == pytest.approx(10 * low["loss"].item(), rel=1e-4)
    assert full["real_accuracy"].item() == pytest.approx((judge(pixels) > 0).float().mean().item())
    assert full["fake_accuracy"].item() == pytest.approx((judge(made) < 0).float().mean().item())


def test_lecam_pulls_verdicts_to_the_others_running_mean():
    lecam = LeCam(decay=0.9)
    lecam.fake.fill_(-1.0)
    real = torch.tensor([2.0, 4.0], requires_grad=True)
    loss = lecam(real, torch.tensor([0.5]))
    assert loss.item() == pytest.approx((3 + 1) ** 2) and lecam.real.item() == pytest.approx(0.3)
    assert lecam.fake.item() == pytest.approx(-0.9 + 0.05)
    loss.backward()
    assert (real.grad > 0).all()


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 3)])
def test_the_blur_halves_any_size_and_keeps_flat_pictures_flat(size):
    blurred = BlurPool((1.0, 3.0, 3.0, 1.0))(torch.ones(1, 2, *size))
    assert blurred.shape[-2:] == tuple(math.ceil(side / 2) for side in size)
    inner = blurred[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.ones_like(inner))


def test_the_blur_discriminator_has_one_size_of_verdict():
    judge = BlurDiscriminator(width=32, stages=2)
    for size in (32, 80):
        assert judge(torch.rand(1, 3, size, size)).shape == (1, 1, 16, 16)
    with pytest.raises(VgenError, match="multiple of its 32 norm groups, got 48"):
        BlurDiscriminator(width=48)


def test_convnext_distance_compares_logits_at_224(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, pixels):
            assert pixels.shape[-2:] == (224, 224)
            return torch.stack((pixels.mean(dim=(1, 2, 3)), pixels.sum(dim=(1, 2, 3)) * 0), dim=1)

    distance = ConvNeXtDistance(torch.nn.Sequential(Mean(), torch.nn.Dropout(0.5))).train()
    x = torch.zeros(2, 3, 32, 32)
    found = distance(x, x + 0.2)
    assert found.shape == (2, 1, 1, 1) and distance(x, x).abs().max() == 0
    shift = 0.1 * (1 / distance.std).mean()  # a change of 0.2 on [-1, 1] is one of 0.1 on [0, 1]
    torch.testing.assert_close(found.flatten(), (shift.square() / 2).expand(2), rtol=1e-3, atol=0)
    torch.save({"nothing": x}, tmp_path / "x.pth")
    with pytest.raises(VgenError, match="does not fit ConvNeXt"):
        ConvNeXtDistance.from_file(tmp_path / "x.pth")


def test_a_mean_of_distances_is_weighted():
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x, y):
            return torch.full((len(x), 1, 1, 1), self.value)

    x = torch.zeros(2, 3, 8, 8)
    assert WeightedMean((Constant(3.0), Constant(14.0)), (1.0, 0.1))(x, x).flatten().tolist() == pytest.approx(
        [4.0, 4.0]
    )


def test_lecam_has_both_halves():
    """relu(mean D(real) - m_fake)^2 + relu(m_real - mean D(fake))^2: arXiv 2104.03310, equation 3."""
    lecam = LeCam()
    lecam.real.fill_(1.0), lecam.fake.fill_(-1.0)
    real, fake = torch.tensor([2.0, 4.0], requires_grad=True), torch.tensor([0.25, 0.75], requires_grad=True)
    loss = lecam(real, fake)
    assert loss.item() == pytest.approx((3 + 1) ** 2 + (1 - 0.5) ** 2)
    loss.backward()
    assert real.grad.tolist() == pytest.approx([4.0, 4.0]) and fake.grad.tolist() == pytest.approx([-0.5, -0.5])


def test_lecam_counts_by_its_weight_in_the_discriminators_objective():
    torch.manual_seed(0)
    pixels, made = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    judge = PatchDiscriminator(width=4, layers=1).eval()
    plain, pulled = (VQLoss(judge, disc_start=0, lecam_weight=weight) for weight in (0.0, 0.3))
    pulled.lecam.real.fill_(2.0), pulled.lecam.fake.fill_(-3.0)
    terms, alone = pulled.discriminate(pixels, made, 1), plain.discriminate(pixels, made, 1)
    lecam = (judge(pixels).mean() + 3).clamp_min(0) ** 2 + (2 - judge(made).mean()).clamp_min(0) ** 2
    assert terms["lecam"].item() == pytest.approx(0.3 * lecam.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(alone["loss"].item() + 0.3 * lecam.item(), rel=1e-4)


def test_adversarial_losses_are_their_formulas():
    real, fake = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([-0.25, 0.75, -3.0])
    softplus = lambda values: sum(math.log1p(math.exp(v)) for v in values) / len(values)  # noqa: E731
    found = {name: loss(real, fake).item() for name, loss in DISCRIMINATOR_LOSSES.items()}
    # Binary cross-entropy with the constants as logits l and the outputs as targets t: softplus(l) - l t.
    swapped = (softplus([1.0]) - real.mean().item() + softplus([0.0])) / 2
    assert found == {
        "hinge": pytest.approx(((0.5 + 0 + 2) / 3 + (0.75 + 1.75 + 0) / 3) / 2),
        "vanilla": pytest.approx((softplus([-0.5, -2.0, 1.0]) + softplus([-0.25, 0.75, -3.0])) / 2),
        "non-saturating": pytest.approx(swapped),
    }
    assert {name: loss(fake).item() for name, loss in GENERATOR_LOSSES.items()} == {
        "hinge": pytest.approx(2.5 / 3),
        "non-saturating": pytest.approx(softplus([1.0]) + 2.5 / 3),
    }


def test_every_weight_multiplies_its_term():
    torch.manual_seed(0)
    pixels, made = torch.rand(2, 2, 3, 32, 32)
    judge, distance = PatchDiscriminator(width=4, layers=1).eval(), PyramidLoss(levels=2)
    weights = {"reconstruction_weight": 3.0, "perceptual_weight": 0.7, "disc_weight": 0.2}
    loss = VQLoss(judge, distance, disc_start=0, reconstruction_loss="l1", **weights)
    latent = Quantized(ZERO, ZERO, torch.tensor(0.5), torch.tensor(0.25), torch.tensor(0.125))
    terms = loss.generator(pixels, made, latent, 1)
    expected = 3 * (pixels - made).abs().mean() + 0.7 * distance(pixels, made).mean() - 0.2 * judge(made).mean()
    assert terms["loss"].item() == pytest.approx(expected.item() + 0.875, rel=1e-5)
