"""The KL autoencoder: tokens, noise, scale, files, training, bad input."""

from __future__ import annotations

import pytest
import torch

from vgen.errors import VgenError
from vgen.tokenizers_vis.kl import SIZES, KLModel
from vgen.tokenizers_vis.registry import open_tokenizer

TINY = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 3, "num_groups": 4}


@pytest.fixture(scope="module")
def model() -> KLModel:
    torch.manual_seed(0)
    return KLModel(**TINY).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def published(model: KLModel) -> dict[str, torch.Tensor]:
    """The state dict under the names of MAR's file (two levels)."""
    names = {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2", ".res.": ".block."}
    names |= {"encoder.conv_blocks": "encoder.down"}
    names |= {f"decoder.conv_blocks.{i}": f"decoder.up.{1 - i}" for i in range(2)}
    state = {}
    for key, value in model.state_dict().items():
        for new, old in names.items():
            key = key.replace(new, old)
        state[key] = value
    return state


@torch.no_grad()
def test_pictures_and_clips(model, pixels):
    tokens = model.encode(pixels)
    assert tokens.shape == (3, 96, 3) and model.spec.grid(16, 24) == (1, 8, 12)
    assert model.decode(tokens, (1, 8, 12)).shape == pixels.shape
    clip = torch.stack((pixels, pixels.flip(0)), dim=2)
    both = model.encode(clip)
    torch.testing.assert_close(both, torch.cat((tokens, tokens.flip(0)), dim=1))
    decoded = model.decode(both, (2, 8, 12))
    assert decoded.shape == clip.shape
    torch.testing.assert_close(decoded[:, :, 0], model.decode(tokens, (1, 8, 12)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_pictures_do_not_depend_on_their_batch(model, pixels):
    tokens = model.encode(pixels)
    torch.testing.assert_close(model.encode(pixels[1:2]), tokens[1:2], atol=1e-5, rtol=0)
    decoded = model.decode(tokens, (1, 8, 12))
    torch.testing.assert_close(model.decode(tokens[2:], (1, 8, 12)), decoded[2:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_noise_moves_tokens_by_the_posteriors_deviation(model, pixels):
    noise = torch.randn(3, 96, 3, generator=torch.Generator().manual_seed(2))
    mode, sample = model.encode(pixels), model.encode(pixels, noise)
    deviation = (0.5 * model.posterior(pixels).log_variance).exp().flatten(2).mT
    torch.testing.assert_close(sample - mode, deviation * noise * model.config.scale)


@torch.no_grad()
def test_latents_may_be_packed_into_tokens(model, pixels, tmp_path):
    packed = KLModel(**TINY, packing=2).eval()
    packed.load_state_dict(model.state_dict())
    assert packed.spec.channels == 12 and packed.spec.grid(16, 24) == (1, 4, 6)
    noise = torch.randn(3, 24, 12, generator=torch.Generator().manual_seed(4))
    tokens = packed.encode(pixels, noise)
    maps = model.encode(pixels).mT.view(3, 3, 8, 12)
    mode = packed.encode(pixels)
    for channel, row, column in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):  # of token (1, 2): rows 2 and 3, columns 4 and 5
        assert torch.equal(mode[:, 1 * 6 + 2, (channel * 2 + row) * 2 + column], maps[:, channel, 2 + row, 4 + column])
    mean, deviation = packed.moments(pixels)
    torch.testing.assert_close(tokens, mean + deviation * noise)
    torch.testing.assert_close(packed.decode(mode, (1, 4, 6)), model.decode(model.encode(pixels), (1, 8, 12)))
    with pytest.raises(VgenError, match="width must be a multiple of 4"):
        packed.encode(pixels[..., :22])
    packed.save_pretrained(tmp_path)
    assert open_tokenizer(tmp_path).spec == packed.spec


@torch.no_grad()
def test_scale_is_between_latents_and_tokens(model, pixels):
    double = KLModel(**TINY, scale=2 * model.config.scale).eval()
    double.load_state_dict(model.state_dict())
    tokens = model.encode(pixels)
    torch.testing.assert_close(double.encode(pixels), 2 * tokens)
    torch.testing.assert_close(double.decode(2 * tokens, (1, 8, 12)), model.decode(tokens, (1, 8, 12)))


@torch.no_grad()
def test_calibrated_latents_have_unit_deviation(pixels, tmp_path):
    torch.manual_seed(3)
    model = KLModel(**TINY).eval()
    scale = model.calibrate(pixels)
    noise = torch.randn(3, 96, 3, generator=torch.Generator().manual_seed(4))
    assert model.encode(pixels, noise).std().item() == pytest.approx(1, abs=0.05)
    model.save_pretrained(tmp_path)
    assert KLModel.from_pretrained(tmp_path).config.scale == scale


@torch.no_grad()
def test_files(model, pixels, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert isinstance(again, KLModel) and torch.equal(again.encode(pixels), model.encode(pixels))
    state = published(model)
    assert "encoder.down.1.attn.0.q.weight" in state and "decoder.up.1.upsample.conv.weight" in state
    torch.save({"model": {**state, "loss.logvar": torch.zeros(())}}, tmp_path / "kl.ckpt")  # as LDM's training files
    loaded = KLModel.from_single_file(tmp_path / "kl.ckpt", TINY)
    assert not loaded.training and torch.equal(loaded.encode(pixels), model.encode(pixels))
    del state["decoder.up.0.block.1.conv1.weight"]
    with pytest.raises(VgenError, match=r"does not fit KLModel.*1 missing"):
        KLModel.from_original(state, TINY)
    with pytest.raises(VgenError, match="does not fit KLModel"):
        KLModel.from_single_file(tmp_path / "kl.ckpt")
    with pytest.raises(VgenError, match="did you mean 'kl-16'"):
        KLModel.from_single_file(tmp_path / "kl.ckpt", "kl16")


def test_training_reaches_every_parameter():
    torch.manual_seed(5)
    model = KLModel(**TINY, patch_size=2).train()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    out = model(pixels, torch.randn(2, 3, 4, 4))
    assert out.reconstruction.shape == pixels.shape and model.spec.downsample == (1, 4, 4)
    (out.reconstruction.sub(pixels).square().mean() + 1e-6 * out.posterior.kl().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.last_layer is model.decoder.conv_out.weight


def test_posterior_is_fp32_under_autocast(model, pixels):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.posterior(pixels).log_variance.dtype == torch.float32


@pytest.mark.parametrize("size", [name for name in SIZES if name.startswith("emoji")])
def test_small_sizes_are_small(size):
    with torch.device("meta"):
        model = KLModel.of_size(size)
    assert sum(p.numel() for p in model.parameters()) < 4e6
    assert model.spec.grid(64, 64)[1:] in {(8, 8), (16, 16)}


def test_bad_input(model, pixels):
    tokens = torch.zeros(1, 4, 3)
    with pytest.raises(VgenError, match="height must be a multiple of 2"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(VgenError, match=r"noise must have the shape of the latents, \[3, 96, 3\], got \[3, 3, 8, 12\]"):
        model.encode(pixels, torch.zeros(3, 3, 8, 12))
    with pytest.raises(VgenError, match="has 6 positions, got 4"):
        model.decode(tokens, (1, 2, 3))
    with pytest.raises(VgenError, match="no steps"):
        model.decode(tokens, steps=3)
    with pytest.raises(VgenError, match=r"floats \[B, N, 3\]"):
        model.decode(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(VgenError, match=r"standard deviation of about 1, found 4\.\d+"):
        model.decode(torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0)) / 0.2325)
    with pytest.raises(VgenError, match="NaN"):
        model.decode(torch.full((1, 4, 3), float("nan")))
