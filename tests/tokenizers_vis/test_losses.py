"""Tokenizer losses: the GAN table, the start of the GAN, perceptual distances."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vgen.errors import VgenError
from vgen.tokenizers_vis.losses import DISCRIMINATOR_LOSSES, VQLoss
from vgen.tokenizers_vis.patchgan import PatchDiscriminator
from vgen.tokenizers_vis.perceptual import LPIPS, PyramidLoss
from vgen.tokenizers_vis.quantizers import Quantized

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
