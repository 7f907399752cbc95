"""TiTok and TA-TiTok (specs/titok.md, sections 2 and 6): encoders, quantizers, posteriors, decoders."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from einops import rearrange
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian
from vgen.tokenizers_vis.titok.legacy import TiTokLegacy, proxy_loss
from vgen.tokenizers_vis.titok.titok import TiTokVAE, TiTokVQ


def arguments(fixture: Fixture) -> dict[str, Any]:
    """Constructor arguments that every class has."""
    config, model = fixture.config, fixture.config["vq_model"]
    shapes = {
        name: tuple(config[key][field] for field in ("width", "layers", "heads"))
        for name, key in (("encoder_shape", "vit_enc"), ("decoder_shape", "vit_dec"))
    }
    return {
        **shapes,
        "image_size": config["crop_size"],
        "encoder_patch_size": model["vit_enc_patch_size"],
        "decoder_patch_size": model["vit_dec_patch_size"],
        "num_tokens": model["num_latent_tokens"],
        "channels": model["token_size"],
    }


def code_arguments(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "codebook_size": model["codebook_size"],
        "codebook_l2_norm": model["use_l2_norm"],
        "commit_loss_beta": model["commitment_cost"],
    }


def text_arguments(fixture: Fixture) -> dict[str, int]:
    model = fixture.config["vq_model"]
    if "text_guidance" not in fixture.inputs:
        return {}
    return {"text_tokens": model.get("text_context_length", 77), "text_width": model.get("text_embed_dim", 768)}


def check_codes(fixture: Fixture, model: TiTokVQ | TiTokLegacy) -> Any:
    """Everything up to the codes; returns what the quantizer says in train mode (the original has losses in either)."""
    image, out = fixture.inputs["image"], fixture.outputs  # in [0, 1]: the original's range
    pixels = image * 2 - 1
    assert_close(model.features(pixels), out["z"], what="z")
    assert_equal(model.encode(pixels), rearrange(out["indices"], "b 1 n -> b n"), "encode")
    quantize = deepcopy(model.quantize).train()  # a copy: online clustering moves its codes in train mode
    found = quantize(out["z"])
    assert_equal(found.indices, rearrange(out["indices"], "b 1 n -> b n"), "indices")
    assert_close(found.quantized, out["z_q"], what="z_q")
    assert_close(found.commit, out["commitment_loss"], what="commitment loss")
    assert_close(found.vq, out["codebook_loss"], what="codebook loss")
    assert_close(found.vq + found.commit, out["quantizer_loss"], what="quantizer loss")
    return found


def check_pictures(fixture: Fixture, model: TiTokVQ | TiTokLegacy, text: torch.Tensor | None = None) -> None:
    pixels, out = fixture.inputs["image"] * 2 - 1, fixture.outputs
    forward = model(pixels, text)
    assert_close((forward.reconstruction + 1) / 2, out["recon"], what="reconstruction")
    decoded = model.decode(fixture.inputs["tokens"], condition=text)
    assert_close((decoded + 1) / 2, out["recon_from_tokens"], what="decode")


@torch.no_grad()
def check_vq(fixture: Fixture) -> None:
    config = {**arguments(fixture), **code_arguments(fixture.config["vq_model"]), **text_arguments(fixture)}
    model = TiTokVQ.from_original(
        fixture.weights, {**config, "clustering": fixture.config["vq_model"].get("clustering_vq", False)}
    )
    check_codes(fixture, model)
    check_pictures(fixture, model, fixture.inputs.get("text_guidance"))


@torch.no_grad()
def check_legacy(fixture: Fixture) -> None:
    inputs, out, pixel = fixture.inputs, fixture.outputs, fixture.config["pixel_decoder"]
    config = {
        **arguments(fixture),
        **code_arguments(fixture.config["vq_model"]),
        "proxy_codes": pixel["num_embeddings"],
        "pixel_width": pixel["hidden_channels"],
        "pixel_mult": pixel["channel_mult"],
        "pixel_blocks": pixel["num_res_blocks"],
        "pixel_channels": pixel["z_channels"],
    }
    model = TiTokLegacy.from_original(fixture.weights, config)
    quantized = check_codes(fixture, model)
    logits = model.decoder(out["z_q"])
    assert_close(logits, out["proxy_logits"], what="proxy logits")
    assert_equal(logits.argmax(dim=1), out["proxy_argmax"], "most likely proxy codes")
    assert_close(model.expected_codes(logits), out["pixel_latent"], what="expected pixel codes")
    terms = proxy_loss(logits, inputs["proxy_codes"], quantized)
    assert_close(terms["cross_entropy"], out["stage1_ce"], what="cross-entropy of stage 1")
    assert_close(terms["loss"], out["stage1_total"], what="objective of stage 1")
    check_pictures(fixture, model)


@torch.no_grad()
def check_vae(fixture: Fixture) -> None:
    inputs, out = fixture.inputs, fixture.outputs
    pixels, text = inputs["image"] * 2 - 1, inputs.get("text_guidance")
    config = {**arguments(fixture), **text_arguments(fixture), "scale": 1 / out["latent"].std().item()}
    model = TiTokVAE.from_original(fixture.weights, config)
    assert_close(model.features(pixels), out["z"], what="z")
    posterior = model.posterior(pixels)
    assert_close(posterior.mean, out["mean"], what="mean")
    assert_close(posterior.log_variance, out["logvar"], what="log-variance")
    each = [DiagonalGaussian(*parts) for parts in zip(posterior.mean.split(1, 3), posterior.log_variance.split(1, 3))]
    assert_close(torch.stack([part.kl() for part in each], dim=1), out["kl"], what="KL of each token")
    assert_close(posterior.kl(), out["kl"].sum(dim=1), what="KL of each picture")

    noise = inputs["noise_0"]
    sampled, latents = model(pixels, noise, text), rearrange(out["latent"], "b c 1 n -> b n c") * model.config.scale
    assert_close(sampled.posterior.sample(noise), out["latent"], what="latent")
    assert_close(model.encode(pixels, rearrange(noise, "b c 1 n -> b n c")), latents, what="encode")
    assert_close((sampled.reconstruction + 1) / 2, out["recon"], what="reconstruction")
    decoded = model.decode(latents, condition=text)
    assert_close((decoded + 1) / 2, out["recon_from_tokens"], what="decode")
    mode = model.decode(model.encode(pixels), condition=text)
    assert_close((mode + 1) / 2, out["mode_recon"], what="reconstruction of the mode")


@checker("titok.vq", "titok.vae", "titok.tatitok")
def check_titok(fixture: Fixture) -> None:
    model = fixture.config["vq_model"]
    if model.get("quantize_mode", "vq") == "vae":
        check_vae(fixture)
    elif fixture.config.get("is_legacy", model.get("is_legacy", True)):
        check_legacy(fixture)
    else:
        check_vq(fixture)
