"""FlexTok (specs/flextok.md): quantizer, VAE, encoder, velocities, flow traces, training forward, and all of it together."""

from __future__ import annotations

from typing import Any

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker
from torch import Tensor, nn

from vgen.checkpoints import load_exactly
from vgen.samplers.flow import (
    FlowGuidance,
    ProjectedGuidance,
    euler,
    even_times,
    logit_normal_times,
    mode_times,
    noisy,
    spread_draws,
)
from vgen.samplers.types import as_grid
from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.tokenizers_vis.flextok.nets import FlexTokDecoder, FlexTokEncoder
from vgen.tokenizers_vis.flextok.vae import FlexTokVAE
from vgen.tokenizers_vis.latents.fsq import FiniteScalarQuantizer

GUIDED = 1e-3  # guidance multiplies rounding errors by its scale


def vae_options(config: dict[str, Any], scale: float, channels: int) -> dict[str, Any]:
    return {
        "latent_channels": channels,
        "block_out_channels": config["block_out_channels"],
        "layers_per_block": config["layers_per_block"],
        "norm_num_groups": config["norm_num_groups"],
        "scale": scale,
    }


def options(config: dict[str, Any]) -> dict[str, Any]:
    """A fixture's config as arguments of FlexTok."""
    assert (config["enc_mask"], config["dec_mask"], config["adaLN_expansion"]) == ("causal_last", "full", 2)
    assert (config["register_posemb"], config["patch_posemb"]) == ("learnable_sum", "sincos")
    return {
        "vae_options": vae_options(config["vae"], config["vae_scaling_factor"], config["latent_channels"]),
        "encoder_width": config["enc_dim"],
        "encoder_depth": config["enc_depth"],
        "decoder_width": config["dec_dim"],
        "decoder_depth": config["dec_depth"],
        "head_dim": config["head_dim"],
        "patch_size": config["patch_size"],
        "max_grid": config["max_grid"],
        "registers": config["n_registers"],
        "levels": config["fsq_levels"],
        "frequencies": config["freq_size"],
        "max_time": config["max_timestep"],
    }


def part(fixture: Fixture, name: str) -> FlexTokEncoder | FlexTokDecoder:
    """The encoder or decoder of a fixture that holds no other weights."""
    with torch.device("meta"):
        module: nn.Module = getattr(FlexTok(**options(fixture.config)), name)
    load_exactly(module, {key.removeprefix(f"{name}."): value for key, value in fixture.weights.items()})
    return module.eval()


def as_keep(values: list[int] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values)


@checker("flextok.fsq")
def check_fsq(fixture: Fixture) -> None:
    inputs, out = fixture.inputs, fixture.outputs
    quantizer = FiniteScalarQuantizer(tuple(fixture.config["fsq_levels"]))
    assert_equal(torch.tensor(quantizer.levels), out["levels"], "levels")
    assert_equal(torch.tensor(quantizer.basis), out["basis"], "basis")
    assert_close(quantizer.bound(inputs["z"]), out["bounded"], what="bound")
    codes, tokens = quantizer.quantize(inputs["z"])
    assert_close(codes, out["quant"], what="codes")
    assert_equal(tokens, out["tokens"], "indices")
    assert_close(quantizer.codes(inputs["indices"]), out["codes"], what="lookup")
    assert_equal(quantizer.indices(out["codes"]), out["indices_back"], "indices of looked up codes")


@checker("flextok.vae")
@torch.no_grad()
def check_vae(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    weights = {key.removeprefix("vae.vae."): value for key, value in fixture.weights.items()}
    model = FlexTokVAE.from_original(weights, vae_options(config, config["scaling_factor"], config["latent_channels"]))
    posterior = model.posterior(inputs["images"])
    assert_close(posterior.mean, out["mean"], what="mean")
    assert_close(posterior.log_variance, out["logvar"], what="log-variance")
    assert_close(posterior.kl(), out["kl"], what="KL divergence")
    latents = posterior.sample(inputs["eps"]) * model.config.scale
    assert_close(latents, out["latents"], what="latents")
    tokens = model.encode(inputs["images"], inputs["eps"].flatten(2).mT)
    assert_close(tokens, out["latents"].flatten(2).mT, what="encode")
    assert_close(model.reconstruct(latents / model.config.scale), out["images"], what="images")


@checker("flextok.encode")
@torch.no_grad()
def check_encode(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    encoder = part(fixture, "encoder")
    z = encoder(inputs["latents"])
    assert_close(z, out["z"], what="register outputs")
    codes, tokens = FiniteScalarQuantizer(tuple(config["fsq_levels"])).quantize(z)
    assert_close(codes, out["quant"], what="codes")
    assert_equal(tokens, out["tokens"], "tokens")

    patches = inputs["latents"][0, 0].numel() // config["patch_size"] ** 2
    own = FlexTokEncoder.mask(patches, config["n_registers"])
    for name, mask in (("enc_mask", own), ("dec_mask", torch.ones_like(own))):
        packed = torch.zeros_like(out[name], dtype=torch.bool)
        whole = torch.block_diag(*[mask.float()] * len(inputs["latents"])) > 0
        packed[: len(whole), : len(whole)] = whole  # the release packs the batch into one padded sequence
        assert_equal(packed, out[name], name)


@checker("flextok.velocity")
@torch.no_grad()
def check_velocity(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    decoder = part(fixture, "decoder")
    embedder = decoder.module_dict.dec_time_embedder
    assert_close(embedder.sinusoid(inputs["time_values"]), out["time_sinusoid"], what="time sinusoid")
    assert_close(embedder(inputs["time_values"]), out["time_emb"], what="time embedding")
    codes = FiniteScalarQuantizer(tuple(config["fsq_levels"])).codes(inputs["tokens"])
    assert_close(codes, inputs["quant"], what="codes of the tokens")
    for name, keep in config["keep"].items():
        registers = decoder.registers(codes, as_keep(keep), as_keep(config["drop"][name]))
        if all(config["drop"][name] or [False]):
            assert_close(decoder.null_registers(len(codes)), registers, what="null registers")
        for j in range(len(codes)):  # latent maps may differ in size
            velocity, features = decoder(
                inputs[f"xt_{j}"], inputs["t"][j : j + 1], registers[j : j + 1], config["repa_layer"]
            )
            assert_close(velocity, out[f"v_{name}_{j}"], what=f"velocity {name}, sample {j}")
            if f"repa_patches_{name}_{j}" in out:
                assert_close(features, out[f"repa_patches_{name}_{j}"], what=f"features {name}, sample {j}")


def guidance_of(run: dict[str, Any]) -> FlowGuidance:
    scale = run["g"]
    if isinstance(scale, str):  # a formula of the time such as "1+4*t"
        formula = compile(scale, "scale", "eval")
        scale = lambda time: eval(formula, {"__builtins__": {}}, {"t": time})  # noqa: E731
    if not run["apg"]:
        return FlowGuidance(scale)
    known = {"momentum": "momentum", "eta": "parallel", "norm_threshold": "threshold"}
    return ProjectedGuidance(scale, **{ours: run[theirs] for theirs, ours in known.items() if theirs in run})


@checker("flextok.flow")
@torch.no_grad()
def check_flow(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    with torch.device("meta"):
        model = FlexTok(**options(config))
    model.decoder = decoder = part(fixture, "decoder")
    model.encoder, model.vae = nn.Identity(), nn.Identity()  # not in the recording
    codes = model.quantizer.codes(inputs["tokens"])
    assert_close(codes, inputs["quant"], what="codes of the tokens")
    keep = torch.tensor(config["keep"])
    for name, run in config["runs"].items():
        guidance = guidance_of(run)
        seen: dict[str, list[Tensor]] = {"states": [], "t": [], "v_cond": [], "v_uncond": []}
        count = len(guidance.rows)

        def spy(module, arguments, result, seen=seen, rows=count):
            x, time, _ = arguments
            seen["states"].append(x.chunk(rows)[0])
            seen["t"].append(time.chunk(rows)[0])
            for key, part in zip(("v_cond", "v_uncond"), result[0].chunk(rows)):
                seen[key].append(part)

        handle = decoder.register_forward_hook(spy)
        final = euler(model.velocity(codes, keep, guidance), inputs["noise0"], even_times(run["steps"]))
        handle.remove()
        for key, values in seen.items():
            if values or f"{name}_{key}" in out:
                assert_close(torch.stack(values), out[f"{name}_{key}"], GUIDED, what=f"{name}: {key}")
        assert_close(final, out[f"{name}_final"], GUIDED, what=f"{name}: result")


def recorded_times(config: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    """The times of a training forward from its recorded draws: uniform ones, or, if logit-normal and not stratified, normal ones."""
    (draws,) = (value for value in inputs.values() if value.dim() == 1)
    if not config["ln"]:
        return mode_times(draws, config["mode_scale"])
    # The original spells the option this way.
    spread = config.get("stratified", config.get("stratisfied", False))
    return logit_normal_times(torch.special.ndtri(spread_draws(draws)) if spread else draws)


@checker("flextok.train")
@torch.no_grad()
def check_train(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    decoder = part(fixture, "decoder")
    times = recorded_times(config, inputs)
    assert_close(times, out["sigma"], what="times")
    x = noisy(inputs["x0"], inputs["eps"], times)
    assert_close(x, out["xt"], what="noisy latents")
    registers = decoder.registers(inputs["quant"], as_keep(config["keep"]), as_keep(config["drop"]))
    velocity, _ = decoder(x, times, registers)
    assert_close(velocity, out["v"], what="velocity")
    loss = torch.nn.functional.mse_loss(velocity, inputs["eps"] - inputs["x0"])
    assert_close(loss, out["loss"], what="loss")


@checker("flextok.e2e")
@torch.no_grad()
def check_whole(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    model = FlexTok.from_original(fixture.weights, options(config))
    images = inputs["images"]
    assert as_grid(model.config.registers) == model.spec.grid(*images.shape[-2:])
    tokens = model.encode(images, inputs["vae_eps"])
    assert_equal(tokens, out["tokens"], "tokens")
    guidance = guidance_of(config)
    settings = {"steps": config["steps"], "guidance": guidance, "noise": inputs["noise0"], "size": images.shape[-2:]}
    assert_close(model.decode(tokens, num_tokens=config["keep"], **settings), out["images"], GUIDED, what="images")
    codes, keep = model.quantizer.codes(tokens), torch.tensor(config["keep"])
    latents = euler(model.velocity(codes, keep, guidance), inputs["noise0"], even_times(config["steps"]))
    assert_close(latents, out["latents"], GUIDED, what="latents")
