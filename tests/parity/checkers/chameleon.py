"""Chameleon's VQGAN (specs/chameleon_vq.md, specs/zipar.md section 2)."""

from typing import Any

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker
from torch import Tensor

from vgen.layers.pixels import to_images
from vgen.tokenizers_vis.base import to_uint8
from vgen.tokenizers_vis.chameleon import ChameleonVQGAN


def options(config: dict[str, Any]) -> dict[str, Any]:
    nets = config["ddconfig"]
    assert not nets["attn_resolutions"] and not nets["double_z"]
    found = {key: nets[key] for key in ("ch", "ch_mult", "num_res_blocks", "z_channels")}
    return {**found, "n_embed": config["n_embed"], "embed_dim": config["embed_dim"]}


def whole(fixture: Fixture) -> dict[str, Tensor]:
    """The recorded weights; a half that the recording left out is filled with what nothing looks at."""
    model = ChameleonVQGAN(**options(fixture.config))
    levels = len(fixture.config["ddconfig"]["ch_mult"])
    own = {_original(key, levels): value for key, value in model.state_dict().items()}
    assert fixture.weights.keys() <= own.keys()
    return {**own, **fixture.weights}


def _original(key: str, levels: int) -> str:
    """Our name of a parameter -> taming's."""
    parts = key.split(".")
    if parts[1] == "conv_blocks":
        level = int(parts[2]) if parts[0] == "encoder" else levels - 1 - int(parts[2])
        side = {"encoder": "down", "decoder": "up"}[parts[0]]
        return ".".join([parts[0], side, str(level), *("block" if p == "res" else p for p in parts[3:])])
    if parts[1] == "mid":
        return ".".join([parts[0], "mid", ("block_1", "attn_1", "block_2")[int(parts[2])], *parts[3:]])
    return key


@checker("chameleon_vq.encode")
@torch.no_grad()
def check_encode(fixture: Fixture) -> None:
    model = ChameleonVQGAN.from_original(whole(fixture), options(fixture.config))
    out = fixture.outputs
    features = model.features(fixture.inputs["x"])
    assert_close(features, out["prequant"], what="features")
    found = model.quantize.train()(features)  # in eval mode there are no losses
    assert_equal(found.indices.flatten(), out["indices"], "indices")
    assert_equal(model.encode(fixture.inputs["x"]).flatten(), out["indices"], "encode")
    assert_close(found.quantized, out["quant"], what="quantised map")
    assert_close((found.vq + found.commit)[None], out["loss"], what="loss")


@checker("chameleon_vq.decode")
@torch.no_grad()
def check_decode(fixture: Fixture) -> None:
    model = ChameleonVQGAN.from_original(whole(fixture), options(fixture.config))
    codes, out = fixture.inputs["codes"], fixture.outputs
    grid = (1, *codes.shape[1:])
    assert_close(model.codes_to_vectors(codes.flatten(1), grid), out["quant"], what="code vectors")
    pixels = model.decode(codes.flatten(1), grid)
    assert_close(pixels, out["image"], what="pixels")
    # to_images rounds, the original truncates (x + 1) / 2 * 255: one level apart at most.
    for image, expected in zip(to_images(pixels), out["uint8"]):
        made = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(expected.shape)
        assert (made.int() - expected.int()).abs().max() <= 1
    assert (to_uint8(pixels).movedim(1, -1).int() - out["uint8"].int()).abs().max() <= 1


@checker("zipar.chameleon_vq")
@torch.no_grad()
def check_vqgan(fixture: Fixture) -> None:
    model = ChameleonVQGAN.from_original(fixture.weights, options(fixture.config))
    inputs, out = fixture.inputs, fixture.outputs
    features = model.features(inputs["image"])
    assert_close(features, out["latent"], what="features")
    assert_equal(model.encode(inputs["image"]), out["indices"], "indices")
    grid = model.spec.grid(*inputs["image"].shape[-2:])
    assert_close(model.decode(out["indices"], grid), out["recon"], what="reconstruction")
    assert_close(model.decode(inputs["tokens"], grid), out["pixels"], what="pixels")
