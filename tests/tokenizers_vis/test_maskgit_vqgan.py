"""The MaskGIT-VQGAN tokenizer: shapes, ranges, its shortcut, files, bad input."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.tokenizers_vis.maskgit_vqgan import Block, MaskGITVQGAN

TINY = {
    "hidden_channels": 8,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "z_channels": 5,
    "num_embeddings": 17,
    "num_groups": 4,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MaskGITVQGAN(**TINY).eval()
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    return model


@torch.no_grad()
def test_pictures_of_any_shape_and_clips(model):
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    tokens = model.encode(pixels)
    assert tokens.shape == (2, 24) and tokens.dtype == torch.int64 and model.spec.grid(16, 24) == (1, 4, 6)
    decoded = model.decode(tokens, (1, 4, 6))
    assert decoded.shape == pixels.shape and decoded.min() >= -1 and decoded.max() <= 1
    clip = torch.stack((pixels, pixels.flip(0)), dim=2)
    both = model.encode(clip)
    assert torch.equal(both, torch.cat((tokens, tokens.flip(0)), dim=1))
    assert model.decode(both, (2, 4, 6)).shape == clip.shape


@torch.no_grad()
def test_where_the_width_changes_the_input_is_dropped_from_the_sum():
    block = Block(4, 8, groups=4)
    x = torch.randn(1, 4, 6, 6)
    block.nin_shortcut.weight.zero_()
    block.conv2.weight.zero_()
    assert block(x).abs().max() == 0 and block.nin_shortcut.weight.shape == (8, 8, 1, 1)
    same = Block(4, 4, groups=4)
    same.conv2.weight.zero_()
    assert torch.equal(same(x), x)


def test_gradients_reach_encoder_codebook_and_decoder():
    model = MaskGITVQGAN(**TINY).train()
    out = model(torch.rand(1, 3, 16, 16) * 2 - 1)
    (out.reconstruction.square().mean() + out.quantized.vq + out.quantized.commit).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_files(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.randint(17, (1, 16))
    assert torch.equal(MaskGITVQGAN.from_pretrained(tmp_path / "saved").decode(tokens), model.decode(tokens))
    torch.save(model.state_dict(), tmp_path / "flat.bin")
    assert torch.equal(MaskGITVQGAN.from_single_file(tmp_path / "flat.bin", TINY).decode(tokens), model.decode(tokens))
    with pytest.raises(VgenError, match="does not fit MaskGITVQGAN"):
        MaskGITVQGAN.from_single_file(tmp_path / "flat.bin")
    with pytest.raises(VgenError, match="did you mean 'f16-1024'"):
        MaskGITVQGAN.from_single_file(tmp_path / "flat.bin", "f16-1042")


def test_bad_input(model):
    with pytest.raises(VgenError, match="height must be a multiple of 4"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(VgenError, match=r"0\.\.16"):
        model.decode(torch.full((1, 4), 17))
    with pytest.raises(VgenError, match="has 6 positions"):
        model.decode(torch.zeros(1, 4, dtype=torch.long), (1, 2, 3))
    with pytest.raises(VgenError, match="no steps"):
        model.decode(torch.zeros(1, 4, dtype=torch.long), steps=3)
