"""TokenBridge (specs/tokenbridge.md): the autoencoder and the dimension-wise quantizer."""

from __future__ import annotations

import torch
from einops import rearrange
from parity.checkers.mar_vae import kl_options
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.checkpoints import load_exactly
from vgen.tokenizers_vis.dimensionwise import DimensionwiseQuantizer
from vgen.tokenizers_vis.kl import KLModel


@checker("tokenbridge.vae")
@torch.no_grad()
def check_vae(fixture: Fixture) -> None:
    model = KLModel.from_original(fixture.weights, kl_options(fixture.config))
    images, out = fixture.inputs["images"], fixture.outputs
    posterior = model.posterior(images)
    assert_close(posterior.mean, out["mean"], what="mean")
    assert_close(posterior.log_variance, out["logvar"], what="log-variance")
    assert_close((posterior.log_variance / 2).exp(), out["std"], what="standard deviation")
    assert_close(posterior.kl(), out["kl"], what="KL")
    tokens = model.encode(images, rearrange(fixture.inputs["eps"], "b c h w -> b (h w) c"))
    assert_close(tokens, rearrange(out["latents"], "b c h w -> b (h w) c"), what="latents")
    assert_close(model.decode(tokens, model.spec.grid(*images.shape[-2:])), out["images"], what="images")


@checker("tokenbridge.quant")
def check_quantizer(fixture: Fixture) -> None:
    x, out = fixture.inputs["x"], fixture.outputs
    for case in fixture.config["cases"]:
        tag = case["tag"]
        quantizer = DimensionwiseQuantizer(case["bits"], case["quant_min"], case["quant_max"], case["std_range"])
        tables = {"boundaries": out[f"boundaries_{tag}"], "reconstruction_values": out[f"values_{tag}"]}
        assert_close(quantizer.boundaries, tables["boundaries"], what=f"{tag} boundaries")
        assert_close(quantizer.reconstruction_values, tables["reconstruction_values"], what=f"{tag} values")
        load_exactly(quantizer, tables)  # the last bits of the tables depend on the machine, and with them near ties
        indices, recorded = quantizer.encode(x), out[f"indices_{tag}"]
        sure = recorded >= 0
        assert_equal(indices[sure], recorded[sure], f"{tag} indices")
        dequantised = quantizer.decode(indices)
        assert_close(dequantised[sure], out[f"dequant_{tag}"][sure], what=f"{tag} values of the indices")
