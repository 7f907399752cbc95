"""MingTok: round trip, causality, incremental expansion, positions, files, bad input."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.tokenizers_vis.mingtok.losses import PATCH_LOSSES, patch_loss, visible_patches
from vgen.tokenizers_vis.mingtok.mingtok import MingTok
from vgen.tokenizers_vis.mingtok.nets import Hidden, patchify, subdivide, unpatchify
from vgen.tokenizers_vis.mingtok.training import MingTokObjective, TeacherTerm, draw_mask, paste_hidden

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "latent_channels": 4,
    "encoder_width": 64,
    "encoder_depth": 2,
    "semantic_width": 128,
    "semantic_depth": 2,
    "pixel_patch_size": 2,
    "pixel_width": 64,
    "pixel_depth": 1,
}


@pytest.fixture(scope="module")
def model() -> MingTok:
    torch.manual_seed(0)
    model = MingTok(**TINY).eval()
    with torch.no_grad():
        model.low_level_encoder.pos_embed.normal_()
    return model


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_shapes_and_ranges(model, pixels):
    tokens = model.encode(pixels)
    assert tokens.shape == (3, 16, 4) and model.spec.grid(16, 16) == (1, 4, 4)
    assert model.features(pixels).shape == (3, 16, 128)
    decoded = model.decode(tokens * 1.0)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1
    wide = torch.cat((pixels, pixels), dim=3)
    assert model.decode(model.encode(wide), (1, 4, 8)).shape == wide.shape


@torch.no_grad()
def test_pictures_do_not_depend_on_their_batch(model, pixels):
    torch.testing.assert_close(model.encode(pixels[1:2]), model.encode(pixels)[1:2], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_class_token_does_not_reach_the_patches(model, pixels):
    whole = model(pixels)
    torch.testing.assert_close(model.features(pixels), whole.features[:, :-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.expand(model.encode(pixels)), whole.features[:, :-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(model.encode(pixels)), whole.reconstruction.clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [(1,) * 16, (5, 1, 10), (16,)])
@torch.no_grad()
def test_expansion_with_a_memory_equals_one_call(model, pixels, chunks):
    tokens = model.encode(pixels)
    memory = model.start(3, 16)
    parts = [model.expand(part, memory) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.expand(tokens), atol=1e-5, rtol=0)
    assert memory.length == 16
    with pytest.raises(VgenError, match="16 slots, 17 are needed"):
        model.expand(tokens[:, :1], memory)


@torch.no_grad()
def test_later_latents_do_not_change_earlier_features(model, pixels):
    tokens = model.encode(pixels)
    changed = torch.cat((tokens[:, :7], tokens[:, 7:].flip(0)), dim=1)
    before, after = model.expand(tokens), model.expand(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


@torch.no_grad()
def test_positions(model):
    encoder = model.low_level_encoder
    assert encoder.positions(4, 4) is encoder.pos_embed
    wide = encoder.positions(2, 8)  # as many patches as the table, in another shape
    assert wide.shape == encoder.pos_embed.shape and not torch.equal(wide, encoder.pos_embed)
    for grid in ((2, 8), (5, 3), (16, 16), (1, 1)):
        table = encoder.positions(*grid)
        assert table.shape[1] == grid[0] * grid[1] + 1 and torch.equal(table[:, -1], encoder.pos_embed[:, -1])


def test_layouts_are_inverse_and_in_raster_order(pixels):
    patches = patchify(pixels, 4)
    assert torch.equal(unpatchify(patches, 4, 4), pixels)
    assert torch.equal(patches[0, 5].view(4, 4, 3).movedim(-1, 0), pixels[0, :, 4:8, 4:8])
    numbers = torch.arange(2 * 3 * 4).view(1, 6, 4)  # a grid of 2 x 3 tokens with 2 x 2 numbers each
    assert subdivide(numbers, 2, 2).flatten().tolist()[:6] == [0, 1, 4, 5, 8, 9]
    masked = torch.tensor([[True, False, False, False, False, False]])
    assert visible_patches(masked, 2, 2).view(4, 6).long().sum(dim=1).tolist() == [4, 4, 6, 6]


@pytest.mark.parametrize("kind", PATCH_LOSSES)
def test_losses(kind):
    torch.manual_seed(2)
    prediction, target = torch.randn(2, 6, 12, requires_grad=True), torch.randn(2, 6, 12)
    visible = torch.tensor([[True, True, False, False, False, True]]).expand(2, -1)
    loss = patch_loss(prediction, target, kind, visible)
    loss.backward()
    assert loss > 0 and prediction.grad[:, :2].any()
    if kind != "L1":  # the extremes of the batch scale every patch
        assert not prediction.grad[:, 2:5].any()
    assert patch_loss(prediction, target, kind, torch.ones(2, 6, dtype=torch.bool)) == patch_loss(
        prediction, target, kind
    )


def test_training_reaches_every_parameter_with_checkpointing():
    torch.manual_seed(3)
    model = MingTok(**TINY).train()
    model.enable_gradient_checkpointing()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    out = model(pixels)
    patch_loss(patchify(out.reconstruction, 2), patchify(pixels, 2)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_files(model, pixels, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = MingTok.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode(pixels), model.encode(pixels))
    half = MingTok.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert half.low_level_encoder.cls_token.dtype == torch.bfloat16
    assert half.pixel_decoder.head.weight.dtype == half.sem_to_pix.weight.dtype == torch.float32
    decoded = half.decode(half.encode(pixels.bfloat16()))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, model.decode(model.encode(pixels)), atol=0.15, rtol=0)
    state = {**model.state_dict(), "target_backbone.weight": torch.zeros(1)}
    torch.save({"model": state}, tmp_path / "mingtok.pt")
    assert torch.equal(MingTok.from_single_file(tmp_path / "mingtok.pt", TINY).encode(pixels), model.encode(pixels))
    with pytest.raises(VgenError, match="does not fit MingTok"):
        MingTok.from_single_file(tmp_path / "mingtok.pt", {**TINY, "semantic_depth": 1})
    with pytest.raises(VgenError, match="unknown MingTok size 'l'"):
        MingTok.from_single_file(tmp_path / "mingtok.pt", "l")


def test_preprocessing_takes_the_centre_square_of_any_picture():
    image = Image.new("RGBA", (50, 20), (255, 0, 0, 255))
    image.paste((0, 255, 0, 255), (15, 0, 35, 20))
    pixels = MingTok.preprocess(image, 20)
    assert pixels.shape == (3, 20, 20) and (pixels[1] == 1).all() and (pixels[0] == -1).all()
    assert MingTok.preprocess(Image.new("L", (7, 9), 0), 16).shape == (3, 16, 16)


def test_bad_input(model):
    with pytest.raises(VgenError, match="width must be a multiple of 4"):
        model.encode(torch.zeros(1, 3, 16, 15))
    with pytest.raises(VgenError, match="frame by frame"):
        model.encode(torch.zeros(1, 3, 2, 16, 16))
    with pytest.raises(VgenError, match="5 tokens do not fill a square"):
        model.decode(torch.zeros(1, 5, 4))
    with pytest.raises(VgenError, match="standard deviation of about 1"):
        model.decode(torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0)) * 8)
    with pytest.raises(VgenError, match="no steps"):
        model.decode(torch.zeros(1, 16, 4), guidance=2.0)
    for change, words in (
        ({"encoder_width": 96}, "multiples of its head size 64"),
        ({"pixel_patch_size": 3}, "multiple of pixel_patch_size"),
        ({"image_size": 18}, "multiple of patch_size"),
        ({"latent_channels": 3}, "averages equally many"),
    ):
        with pytest.raises(VgenError, match=words):
            MingTok(**{**TINY, **change})
    with pytest.raises(VgenError, match="did you mean 'L1-tanh'"):
        patch_loss(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), "L1-tan")


@torch.no_grad()
def test_what_is_hidden_does_not_matter(model, pixels):
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[:, 5] = masked[1, 2] = True
    hidden = Hidden(masked, torch.randn(64))
    painted = pixels.clone()
    painted[:, :, 4:8, 4:8] = 1.0  # patch 5
    torch.testing.assert_close(model(painted, hidden).latents, model(pixels, hidden).latents)
    assert not torch.allclose(model(painted).latents, model(pixels).latents)
    pasted = paste_hidden(torch.zeros_like(pixels), pixels, masked, 4)
    assert torch.equal(pasted[0, :, 4:8, 4:8], pixels[0, :, 4:8, 4:8]) and not pasted[0, :, :4].any()


def test_masks_are_a_share_of_the_pictures_and_of_their_patches():
    order = torch.rand(40, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    masked = draw_mask(torch.arange(40) / 40, order, share=0.5, ratio=0.25)
    assert masked.sum(dim=1).tolist() == [4] * 20 + [0] * 20
    assert torch.equal(masked[0], order[0] < 4)


def test_only_visible_patches_count_and_only_masked_ones_are_taught(pixels):
    torch.manual_seed(0)
    objective = MingTokObjective(MingTok(**TINY), masks=True, semantic_term=TeacherTerm(6, 0.5, 8))
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[0, :8] = True
    teacher = torch.randn(3, 8, 8, 6)
    output, terms = objective(pixels, masked, {"semantic": teacher})
    made, real = (patchify(x, 2) for x in (output.reconstruction, pixels))
    seen = visible_patches(masked, 4, 2)
    assert terms["reconstruction"].item() == pytest.approx(patch_loss(made, real, visible=seen).item(), rel=1e-5)
    total = terms["reconstruction"] + 0.5 * terms["semantic_teacher"]
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    other = teacher.clone()
    other[1:] = 3.0  # pictures without a mask
    assert torch.equal(objective(pixels, masked, {"semantic": other})[1]["semantic_teacher"], terms["semantic_teacher"])
    terms["loss"].backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_calibration_gives_tokens_a_standard_deviation_of_one(pixels, tmp_path):
    torch.manual_seed(0)
    model = MingTok(**TINY).eval()
    deviation = model.calibrate(pixels)
    tokens = model.encode(pixels)
    assert tokens.std().item() == pytest.approx(1, rel=1e-4) and tokens.mean().item() == pytest.approx(0, abs=1e-4)
    model.save_pretrained(tmp_path)
    assert MingTok.from_pretrained(tmp_path).config.latent_scale == pytest.approx(deviation)


def test_normalised_patches_have_unbiased_variance_one():
    """(target - mean) / sqrt(var + 1e-6), var with n - 1 as in the released MAE: arXiv 2111.06377, section 3."""
    prediction, target = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    centred = target - target.mean(dim=-1, keepdim=True)
    normal = centred / (centred.square().sum(dim=-1, keepdim=True) / 3 + 1e-6).sqrt()
    found = patch_loss(prediction, target, "L2-normalised")
    torch.testing.assert_close(found, (prediction - normal).square().mean())
