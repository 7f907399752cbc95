"""TokenBridge (specs/tokenbridge.md): the autoencoder and the dimension-wise quantizer."""

from __future__ import annotations

import torch
from einops import rearrange
from parity.checkers.mar_vae import kl_options
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.checkpoints import load_exactly
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.latents.dimensionwise import DimensionwiseQuantizer


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


def _check_values(quantizer: DimensionwiseQuantizer, recorded: torch.Tensor, tag: str) -> None:
    """A value is a quotient by the mass of its bin, a difference of fp32 numbers: the less mass, the less precise on any machine."""
    mass = torch.special.ndtr(quantizer.boundaries.double()).diff()
    rounding = torch.where(mass > 0, 2**-23 * (1 + quantizer.std_range) / mass, 0)
    allowed = 1e-4 * recorded.abs().max().clamp_min(1) + rounding
    error = (quantizer.reconstruction_values - recorded).abs()
    assert (error <= allowed).all(), f"{tag} values: off by {error.max():.3g}"


@checker("tokenbridge.quant")
def check_quantizer(fixture: Fixture) -> None:
    x, out = fixture.inputs["x"], fixture.outputs
    for case in fixture.config["cases"]:
        tag = case["tag"]
        quantizer = DimensionwiseQuantizer(case["bits"], case["quant_min"], case["quant_max"], case["std_range"])
        tables = {"boundaries": out[f"boundaries_{tag}"], "reconstruction_values": out[f"values_{tag}"]}
        assert_close(quantizer.boundaries, tables["boundaries"], what=f"{tag} boundaries")
        _check_values(quantizer, tables["reconstruction_values"], tag)
        load_exactly(quantizer, tables)  # the last bits of the tables depend on the machine, and with them near ties
        indices, recorded = quantizer.encode(x), out[f"indices_{tag}"]
        sure = recorded >= 0
        assert_equal(indices[sure], recorded[sure], f"{tag} indices")
        dequantised = quantizer.decode(indices)
        assert_close(dequantised[sure], out[f"dequant_{tag}"][sure], what=f"{tag} values of the indices")
