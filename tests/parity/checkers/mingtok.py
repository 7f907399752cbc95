"""MingTok (specs/mingtok.md): encoder, semantic decoder with and without a cache, pixel decoder, losses, preprocessing."""

from __future__ import annotations

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker
from PIL import Image
from torch import Tensor

from vgen.tokenizers_vis.mingtok.losses import patch_loss, visible_patches
from vgen.tokenizers_vis.mingtok.mingtok import MingTok
from vgen.tokenizers_vis.mingtok.nets import patchify, subdivide, unpatchify


def mingtok_options(config: dict) -> dict:
    """Arguments of MingTok from the config of a recording."""
    encoder, semantic, pixel = (config[part] for part in ("low_level_encoder", "semantic_decoder", "pixel_decoder"))
    assert semantic["in_dim"] == encoder["out_dim"]
    return {
        "image_size": encoder["img_size"],
        "patch_size": encoder["patch_size"],
        "latent_channels": encoder["out_dim"],
        "encoder_width": encoder["embed_dim"],
        "encoder_depth": encoder["depth"],
        "semantic_width": semantic["embed_dim"],
        "semantic_depth": semantic["decoder_depth"],
        "pixel_patch_size": pixel["patch_size"],
        "pixel_width": pixel["embed_dim"],
        "pixel_depth": pixel["decoder_depth"],
        "latent_mean": config["mean"],
        "latent_scale": config["scaling_factor"],
    }


def _model(fixture: Fixture) -> MingTok:
    return MingTok.from_original(fixture.weights, mingtok_options(fixture.config))


def _square(tokens: Tensor) -> tuple[int, int, int]:
    side = round(tokens.shape[1] ** 0.5)
    return 1, side, side


def _one_by_one(model: MingTok, tokens: Tensor) -> Tensor:
    memory = model.start(*tokens.shape[:2])
    return torch.cat([model.expand(token, memory) for token in tokens.split(1, dim=1)], dim=1)


@checker("mingtok.encode")
@torch.no_grad()
def check_encode(fixture: Fixture) -> None:
    model, out = _model(fixture), fixture.outputs
    for name, image in fixture.inputs.items():
        tag = name.removeprefix("image_")
        grid = model.spec.grid(*image.shape[-2:])
        encoder = model.low_level_encoder
        assert_close(encoder.positions(*grid[1:]), out[f"pos_embed_{tag}"], what=f"{tag} positions")
        assert_close(encoder.embed(image), out[f"tokens_{tag}"], what=f"{tag} tokens")
        assert_close(encoder(image), out[f"latent_raw_{tag}"], what=f"{tag} raw latents")
        whole = model(image)
        assert_close(whole.latents, out[f"latent_{tag}"], what=f"{tag} latents")
        assert_close(whole.features, out[f"x_norm_{tag}"], what=f"{tag} features and class")
        assert_close(whole.features[:, -1], out[f"cls_feature_{tag}"], what=f"{tag} class feature")
        assert_close(model.encode(image), out[f"latent_{tag}"][:, :-1], what=f"{tag} encode")
        assert_close(model.features(image), out[f"features_{tag}"], what=f"{tag} features")


@checker("mingtok.semantic")
@torch.no_grad()
def check_semantic(fixture: Fixture) -> None:
    model, out = _model(fixture), fixture.outputs
    decoder, latent = model.semantic_decoder, fixture.inputs["latent"]
    raw = model.denormalise(latent)
    assert_close(raw, out["latent_raw"], what="raw latents")
    assert_close(decoder.embed(raw), out["in_proj"], what="input")
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in decoder.blocks[0]]
    whole = model.expand(latent)
    for hook in hooks:
        hook.remove()
    for index, value in enumerate(seen):
        assert_close(value, out[f"block{index}"], what=f"block {index}")
    assert_close(whole, out["x_norm_tf"], what="teacher-forced, all tokens")
    assert_close(whole[:, :-1], out["features_tf"], what="teacher-forced")
    count = out["features_inc"].shape[1]
    memory = model.start(len(latent), count)
    steps = [model.expand(latent[:, i : i + 1], memory) for i in range(count)]
    assert_close(torch.cat(steps, dim=1), out["features_inc"], what="token by token")
    for layer in range(len(decoder.blocks[0])):
        keys, values = memory.cache.read(layer, memory.length)
        assert_close(keys, out[f"cache_k{layer}"], what=f"keys of layer {layer}")
        assert_close(values, out[f"cache_v{layer}"], what=f"values of layer {layer}")
    for name, recorded in out.items():
        if name.startswith("features_chunk"):  # the release drops the last feature of a call for several latents
            size = int(name.removeprefix("features_chunk"))
            memory = model.start(len(latent), size)
            assert_close(model.expand(latent[:, :size], memory)[:, :-1], recorded, what=name)
            assert memory.length == size


@checker("mingtok.pixel")
@torch.no_grad()
def check_pixel(fixture: Fixture) -> None:
    model, inputs, out = _model(fixture), fixture.inputs, fixture.outputs
    features, size = inputs["features"], model.config.pixel_patch_size
    grid = _square(features)
    wide = model.sem_to_pix(features)
    assert_close(wide, out["sem_to_pix"], what="sem_to_pix")
    assert_close(subdivide(wide, grid[1], model.ratio), out["pixel_tokens_in"], what="sub-patches")
    prediction = model.patches(features, grid)
    assert_close(prediction, out["pred"], what="head")
    unclamped = unpatchify(prediction, grid[1] * model.ratio, size)
    assert_close(unclamped, out["image_unclamped"], what="image, not clamped")
    assert_close(model.reconstruct(features), out["image"], what="image")
    target = patchify(inputs["target"], size)
    assert_close(target, out["target_patches"], what="target patches")
    visible = visible_patches(inputs["mask"], grid[1], model.ratio)
    plain_l2 = "L2-normalised" if fixture.config["pixel_decoder"]["norm_pix_loss"] else "L2"
    for name, recorded in out.items():
        if name.startswith("loss_"):
            kind, *options = name.removeprefix("loss_").split("_")
            kind = {"L2": "L2" if "nonorm" in options else plain_l2}.get(kind, kind)
            found = patch_loss(out["pred"], target, kind, visible if "masked" in options else None)
            assert_close(found, recorded, what=name)


@checker("mingtok.full")
@torch.no_grad()
def check_full(fixture: Fixture) -> None:
    model, image, out = _model(fixture), fixture.inputs["image"], fixture.outputs
    whole = model(image)
    assert_close(whole.latents, out["latent"], what="latents")
    assert_close(whole.features[:, :-1], out["features"], what="features")
    assert_close(whole.reconstruction.clamp(-1, 1), out["recon"], what="reconstruction")
    tokens = model.encode(image)
    assert_close(model.decode(tokens), out["recon"], what="encode and decode")
    features = _one_by_one(model, out["latent"][:, :-1])
    assert_close(model.reconstruct(features), out["recon_from_latent"], what="from expanded latents")
    assert_close(model.decode(out["latent"][:, :-1]), out["recon_from_latent"], what="decode of latents")
    for name, recorded in out.items():
        if name.startswith("partial_"):
            count = int(name.split("_")[1])
            assert_close(model.reconstruct(features[:, :count]), recorded, what=name)


@checker("mingtok.preprocess")
def check_preprocess(fixture: Fixture) -> None:
    config, expected = fixture.config, fixture.outputs["pixel_values"]
    image = Image.fromarray(fixture.inputs["rgb_u8"].numpy())
    pixels = MingTok.preprocess(image, config["image_size"])
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    assert_close(((pixels + 1) / 2 - mean) / std, expected, what="pixels")
    levels = ((expected * std + mean) * 255).round()
    assert_equal(((pixels + 1) / 2 * 255).round(), levels, "levels")
