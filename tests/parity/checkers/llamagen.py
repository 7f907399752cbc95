"""LlamaGen (specs/llamagen.md): the tokenizer, its quantizer and its training losses."""

from __future__ import annotations

import inspect
import re

import torch
import torch.nn.functional as F
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.checkpoints import load_exactly
from vgen.tokenizers_vis.base import to_uint8
from vgen.tokenizers_vis.latents.quantizers import Quantized, VectorQuantizer
from vgen.tokenizers_vis.losses.objectives import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, VQLoss
from vgen.tokenizers_vis.losses.patchgan import PatchDiscriminator
from vgen.tokenizers_vis.losses.perceptual import LPIPS
from vgen.tokenizers_vis.vq import VQModel


def _named(config: dict, function) -> dict:
    """The entries of a fixture's config that are arguments of `function`."""
    return {name: value for name, value in config.items() if name in inspect.signature(function).parameters}


@checker("llamagen.vq")
def check_vq(fixture: Fixture) -> None:
    config, image, out = fixture.config, fixture.inputs["image"], fixture.outputs
    model = VQModel.from_original(fixture.weights, _named(config, VQModel.__init__))
    grid = model.spec.grid(*image.shape[-2:])
    with torch.no_grad():
        features = model.encoder(image)
        assert_close(features, out["enc_features"], what="encoder")
        assert_close(model.quant_conv(features), out["pre_quant"], what="quant_conv")
        found = model(image)
        assert found.quantized.vq is None, "no losses in eval mode"
        assert_equal(found.quantized.indices.flatten(), out["indices"], "indices")
        assert_close(found.quantized.quantized, out["quant"], what="quantized")
        assert_close(found.reconstruction, out["recon"], what="reconstruction")
        tokens = model.encode(image)
        assert_equal(tokens.flatten(), out["indices"], "encode")
        assert_close(model.decode(tokens, grid), out["decode_code"], what="decode")
        assert_close(model.quantize.lookup(out["indices"]), out["codebook_entry_flat"], what="lookup")
        drawn = model.decode(fixture.inputs["random_codes"], grid)
        assert_close(drawn, out["random_codes_image"], what="decode of random codes")
        uint8 = to_uint8(drawn).movedim(1, -1)
        # A value within rounding error of an integer may be truncated to either side.
        assert (uint8.int() - out["random_codes_uint8_nhwc"].int()).abs().max() <= 1
        assert (uint8 != out["random_codes_uint8_nhwc"]).float().mean() < 1e-3
        resized = F.interpolate(drawn, size=config["out_resized"], mode="bicubic")
        assert_close(resized, out["random_codes_resized"], what="resized")

    model.train()
    trained = model(image)
    codes = trained.quantized
    assert_close(codes.vq, out["train_vq_loss"], what="vq loss")
    assert_close(codes.commit, out["train_commit_loss"], what="commitment loss")
    assert_close(codes.entropy, out["train_entropy_loss"], what="entropy loss")
    assert_close(codes.usage, out["train_usage"], what="usage")
    tail = out["train_queue_tail"]
    assert_equal(model.quantize.codebook_used[-len(tail) :], tail, "queue")
    (F.mse_loss(trained.reconstruction, image) + codes.vq + codes.commit + codes.entropy).backward()
    parameters = dict(model.named_parameters())
    for name, gradient in out.items():
        if name.startswith("grad/"):
            assert_close(parameters[name.removeprefix("grad/")].grad, gradient, what=name)


@checker("llamagen.quantizer")
def check_quantizer(fixture: Fixture) -> None:
    config, out = fixture.config, fixture.outputs
    quantizer = VectorQuantizer(
        config["codebook_size"],
        config["codebook_embed_dim"],
        config["l2_norm"],
        config["beta"],
        config["entropy_loss_ratio"],
    )
    quantizer.load_state_dict(fixture.weights, strict=False)
    z = fixture.inputs["z"].clone().requires_grad_()
    found = quantizer.train()(z)
    assert_equal(found.indices.flatten(), out["indices"], "indices")
    assert_close(found.quantized, out["zq"], what="quantized")
    for name in ("vq", "commit", "entropy", "usage"):
        assert_close(getattr(found, name), out[name], what=name)
    weights = torch.arange(z.numel(), dtype=z.dtype).view_as(z).sin()
    ((found.quantized * weights).sum() + 3 * found.vq + 5 * found.commit + found.entropy).backward()
    assert_close(z.grad, out["grad_z"], what="gradient of z")
    assert_close(quantizer.embedding.weight.grad, out["grad_codebook"], what="gradient of the codebook")
    batch, _, height, width = z.shape
    entry = quantizer.lookup(out["indices"]).view(batch, height, width, -1)
    assert_close(entry, out["entry_bhwc"], what="lookup")
    assert_close(entry.movedim(-1, 1), out["entry_bchw"], what="lookup")


@checker("llamagen.vq_loss")
def check_vq_loss(fixture: Fixture) -> None:
    config, out, weights = fixture.config, fixture.outputs, fixture.weights
    image = fixture.inputs["image"]
    terms = [float(term) for term in re.search(r"codebook_loss tuple = \(([^)]*)\)", fixture.notes)[1].split(",")]
    codes = Quantized(image, image, *map(torch.tensor, terms))
    options = _named(config, VQLoss.__init__)

    def fresh() -> VQLoss:
        discriminator = PatchDiscriminator(image.shape[1], config["ndf"], config["n_layers"])
        loss = VQLoss(discriminator, LPIPS(config["vgg_widths"]), **options)
        load_exactly(loss, {k: v.clone() for k, v in weights.items() if not k.startswith("last_layer.")})
        return loss.train()

    def last_layer() -> tuple[torch.Tensor, torch.Tensor]:
        weight = weights["last_layer.weight"].clone().requires_grad_()
        pad = weight.shape[-1] // 2
        return weight, F.conv2d(fixture.inputs["pre_last"], weight, weights["last_layer.bias"], padding=pad)

    assert_close(last_layer()[1], fixture.inputs["recon"], what="recon")
    assert_close(fresh().perceptual_loss(image, fixture.inputs["recon"]), out["lpips"], what="lpips")
    assert_close(fresh().discriminator(image), out["disc_logits_real_train"], what="logits of real pictures")

    steps = sorted(int(name.removeprefix("gen_loss_step")) for name in out if name.startswith("gen_loss_step"))
    assert steps, "the fixture names no step"
    for step in steps:
        loss = fresh()
        weight, reconstruction = last_layer()
        made = loss.generator(image, reconstruction, codes, step, weight)["loss"]
        assert_close(made, out[f"gen_loss_step{step}"], what=f"generator loss at {step}")
        made.backward()
        assert_close(weight.grad, out[f"gen_grad_last_step{step}"], what=f"gradient of the last layer at {step}")
        assert all(p.grad is None for p in loss.discriminator.parameters()), (
            "the generator step trains no discriminator"
        )
        judged = loss.discriminate(image, reconstruction, step)["loss"]
        assert_close(judged, out[f"disc_loss_step{step}"], what=f"discriminator loss at {step}")
    judged.backward()
    assert_close(loss.discriminator.main[0].weight.grad, out["disc_grad_first"], what="gradient of the discriminator")
    for name, value in loss.state_dict().items():
        recorded = out.get(f"bn_after/{name}")
        # Some recordings hold the statistics as they were *before* the step (restored, then written): nothing to compare with.
        if recorded is not None and not torch.equal(recorded, weights[name]):
            assert_close(value, recorded, what=name)

    real, fake = fixture.inputs["logits_real"], fixture.inputs["logits_fake"]
    for name, value in out.items():
        kind, _, part = name.replace("non_saturating", "non-saturating").partition("_")
        if part == "d_loss":
            assert_close(DISCRIMINATOR_LOSSES[kind](real, fake), value, what=name)
        elif part == "gen_loss":
            assert_close(GENERATOR_LOSSES[kind](fake), value, what=name)
