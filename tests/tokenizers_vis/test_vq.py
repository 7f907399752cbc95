"""The VQ autoencoder: shapes, saving, loading, training in bf16, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ModelMixin

from vgen.errors import VgenError
from vgen.tokenizers_vis import vq
from vgen.tokenizers_vis.losses.objectives import VQLoss
from vgen.tokenizers_vis.losses.patchgan import PatchDiscriminator
from vgen.tokenizers_vis.losses.perceptual import PyramidLoss
from vgen.tokenizers_vis.vq import SIZES, VQModel

TINY = {
    "ch": 8,
    "encoder_ch_mult": (1, 2),
    "decoder_ch_mult": (1, 1),
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 32,
    "codebook_embed_dim": 4,
    "num_groups": 4,
    "usage_window": 128,
}


@pytest.fixture
def model() -> VQModel:
    torch.manual_seed(0)
    return VQModel(**TINY).eval()


@pytest.mark.parametrize("patch_size", [1, 2])
def test_round_trip_of_non_square_pictures(patch_size: int):
    torch.manual_seed(0)
    model = VQModel(**TINY, patch_size=patch_size).eval()
    factor = 2 * patch_size
    assert model.spec.downsample == (1, factor, factor)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        tokens = model.encode(pixels)
        assert tokens.shape == (2, 16 // factor * 24 // factor) and tokens.dtype == torch.int64
        decoded = model.decode(tokens, model.spec.grid(16, 24))
        torch.testing.assert_close(decoded, model(pixels).reconstruction, atol=1e-5, rtol=0)


def test_frames_are_coded_one_by_one(model: VQModel):
    clip = torch.rand(2, 3, 3, 8, 12)
    with torch.no_grad():
        tokens = model.encode(clip)
        assert tokens.shape == (2, 3 * 4 * 6)
        decoded = model.decode(tokens, model.spec.grid(8, 12, frames=3))
        assert decoded.shape == clip.shape
        single = model.decode(model.encode(clip[:, :, 1]), (1, 4, 6))
    torch.testing.assert_close(decoded[:, :, 1], single, atol=1e-5, rtol=0)


def test_save_and_load(model: VQModel, tmp_path):
    model.train()(torch.rand(2, 3, 8, 8))  # moves the usage queue
    model.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.iterdir() if file.stem == "diffusion_pytorch_model"] == [".safetensors"]
    again = VQModel.from_pretrained(tmp_path)
    assert (
        dict(again.config) == {**dict(model.config), "_name_or_path": str(tmp_path)}
        or again.config.ch == model.config.ch
    )
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b) and a.dtype == b.dtype, key
    assert vq.ModelMixin is ModelMixin, "diffusers looks for this name when it reloads a pipeline"


def test_from_original_reads_nested_files_and_fills_the_queue(model: VQModel, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if k != "quantize.codebook_used"}
    state["quantize.codebook_used"] = torch.arange(128).float()  # published files hold floats
    torch.save({"model": {}, "ema": state, "steps": 3}, tmp_path / "vq.pt")
    again = VQModel.from_single_file(tmp_path / "vq.pt", TINY)
    assert not again.training
    assert torch.equal(again.quantize.codebook_used, torch.arange(128, dtype=torch.int32))
    assert torch.equal(again.decoder.conv_out.weight, model.decoder.conv_out.weight)
    del state["quantize.codebook_used"]
    assert VQModel.from_original(state, TINY).quantize.codebook_used.sum() == 0


def test_the_queue_survives_a_cast(model: VQModel):
    model.quantize.codebook_used.fill_(16383)
    assert model.to(torch.bfloat16).quantize.codebook_used.unique().tolist() == [16383]


def test_a_file_of_another_size_is_refused(model: VQModel):
    with pytest.raises(VgenError, match=r"does not fit VQModel.*unexpected|does not fit VQModel.*of another shape"):
        VQModel.from_original(model.state_dict(), {**TINY, "ch": 16})


def test_two_training_steps_in_bf16_channels_last():
    torch.manual_seed(0)
    model = VQModel(**TINY, entropy_loss_ratio=0.1).train().to(memory_format=torch.channels_last)
    loss = VQLoss(PatchDiscriminator(width=4, layers=1), PyramidLoss(levels=1), disc_start=2, disc_adaptive_weight=True)
    pixels = (torch.rand(4, 3, 16, 16) * 2 - 1).to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.discriminator.parameters()], 1e-3)
    for step in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(pixels)
            made = loss.generator(pixels, out.reconstruction, out.quantized, step, model.last_layer)
            judged = loss.discriminate(pixels, out.reconstruction, step)
        assert ("adversarial" in made) == (step == 2) and judged["loss"].requires_grad == (step == 2)
        optimizer.zero_grad()
        sum(term["loss"] for term in (made, judged) if term["loss"].requires_grad).backward()
        optimizer.step()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    assert all(not torch.equal(before[k], v) for k, v in model.state_dict().items() if k.endswith("conv1.weight"))


@pytest.mark.parametrize("size", [name for name in SIZES if name.startswith("emoji")])
def test_small_sizes_are_small(size: str):
    with torch.device("meta"):
        model = VQModel.of_size(size)
    assert sum(p.numel() for p in model.parameters()) < 8e6
    assert model.spec.grid(64, 64)[1:] in {(8, 8), (16, 16)}


def test_errors_say_what_to_do(model: VQModel):
    with pytest.raises(VgenError, match=r"multiple of 2.*got 15; use 14 or 16"):
        model.encode(torch.zeros(1, 3, 16, 15))
    with pytest.raises(VgenError, match=r"0\.\.31.*found 0\.\.32"):
        model.decode(torch.tensor([[0, 1, 2, 32]]))
    with pytest.raises(VgenError, match="pass grid="):
        model.decode(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(VgenError, match="6 positions, got 4 tokens"):
        model.decode(torch.zeros(1, 4, dtype=torch.long), (1, 2, 3))
    with pytest.raises(VgenError, match="no steps or guidance"):
        model.decode(torch.zeros(1, 4, dtype=torch.long), steps=4)
    with pytest.raises(VgenError, match="did you mean 'vq-16'"):
        VQModel.of_size("vq16")
    with pytest.raises(VgenError, match="norm groups"):
        VQModel(**{**TINY, "num_groups": 3})
    with pytest.raises(VgenError, match="equally many levels"):
        VQModel(**{**TINY, "decoder_ch_mult": (1,)})
