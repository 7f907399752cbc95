"""The KL-16 autoencoder of MAR (specs/mar.md, section 3). A recording holds one half of the weights."""

from __future__ import annotations

import torch
from einops import rearrange
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.checkpoints import load_exactly
from vgen.layers.taming import rename_taming
from vgen.tokenizers_vis.kl import KLModel


def attention_levels(resolution: int, levels: int, wanted: list[int]) -> list[int]:
    """Levels whose *nominal* side, counted from `resolution`, is in `wanted`, whatever the size of the picture."""
    return [level for level in range(levels) if resolution // 2**level in wanted]


def kl_options(config: dict) -> dict:
    """Arguments of KLModel from the config of a recording (MAR's and TokenBridge's differ in two names)."""
    assert config["embed_dim"] == config["z_channels"], "one number in the published code"
    places = (config["resolution"], len(config["ch_mult"]))
    encoder = config.get("enc_attn_resolutions", config.get("encoder_attn_resolutions"))
    decoder = config.get("dec_attn_resolutions", config.get("decoder_attn_resolutions"))
    return {
        "ch": config["ch"],
        "ch_mult": config["ch_mult"],
        "num_res_blocks": config["num_res_blocks"],
        "latent_channels": config["embed_dim"],
        "encoder_attention": attention_levels(*places, encoder),
        "decoder_attention": attention_levels(*places, decoder),
        "scale": config["scale"],
        "num_groups": config.get("groups", 32),
    }


def _half(fixture: Fixture) -> KLModel:
    """The recorded half of a model; the other half keeps its fresh weights."""
    model = KLModel(**kl_options(fixture.config))
    recorded = rename_taming(fixture.weights, len(fixture.config["ch_mult"]))
    load_exactly(model, {**model.state_dict(), **recorded})
    return model.eval()


@checker("mar.vae_encode")
@torch.no_grad()
def check_encode(fixture: Fixture) -> None:
    model, image, out = _half(fixture), fixture.inputs["image"], fixture.outputs
    noise = fixture.inputs["noise"]
    assert_close(model.quant_conv(model.encoder(image)), out["moments"], what="moments")
    posterior = model.posterior(image)
    assert_close(posterior.mean, out["mean"], what="mean")
    assert_close(posterior.log_variance, out["logvar"], what="log-variance")
    assert_close((posterior.log_variance / 2).exp(), out["std"], what="standard deviation")
    assert_close(posterior.sample(), out["mode"], what="mode")
    assert_close(posterior.sample(noise), out["sample"], what="sample")
    assert_close(posterior.kl(), out["kl"], what="KL")
    tokens = model.encode(image, rearrange(noise, "b c h w -> b (h w) c"))
    assert_close(tokens, rearrange(out["latent"], "b c h w -> b (h w) c"), what="tokens")
    modes = rearrange(out["mode"], "b c h w -> b (h w) c") * fixture.config["scale"]
    assert_close(model.encode(image), modes, what="tokens without noise")


@checker("mar.vae_decode")
@torch.no_grad()
def check_decode(fixture: Fixture) -> None:
    model, latent, out = _half(fixture), fixture.inputs["latent"], fixture.outputs
    grid = (1, *latent.shape[-2:])
    image = model.decode(rearrange(latent, "b c h w -> b (h w) c"), grid)
    assert_close(image, out["image"], what="image")
    levels = ((image + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)
    close = rearrange(out["image"], "b c h w -> b h w c") * 127.5 + 127.5
    tied = ((close % 1) - 0.5).abs() < 1e-2  # an error of 1e-4 may round these to the other side
    levels = rearrange(levels, "b c h w -> b h w c")
    assert_equal(levels[~tied], out["uint8"][~tied], "uint8")
