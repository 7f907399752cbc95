"""TokenBridge: levels are the nearest ones, any continuous tokenizer can be wrapped, saved and loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import assert_same_weights

from vgen.errors import VgenError
from vgen.tokenizers_vis.flextok.vae import FlexTokVAE
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.latents.dimensionwise import DimensionwiseQuantizer
from vgen.tokenizers_vis.mingtok.mingtok import MingTok
from vgen.tokenizers_vis.registry import open_tokenizer
from vgen.tokenizers_vis.titok.titok import TiTokVAE
from vgen.tokenizers_vis.tokenbridge import TokenBridge
from vgen.tokenizers_vis.vq import VQModel

KL = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 3, "num_groups": 4}
MING = {
    "image_size": 16,
    "patch_size": 8,
    "latent_channels": 4,
    "encoder_width": 64,
    "encoder_depth": 1,
    "semantic_width": 64,
    "semantic_depth": 1,
    "pixel_patch_size": 4,
    "pixel_width": 64,
    "pixel_depth": 1,
}
FLEX = {"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TITOK = {
    "image_size": 16,
    "encoder_patch_size": 8,
    "decoder_patch_size": 8,
    "encoder_shape": (32, 1, 2),
    "decoder_shape": (32, 1, 2),
    "num_tokens": 3,
    "channels": 4,
}


def floats(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# bits that leave bins without width at the ends (std_range 1: most of them), and bits that do not
@pytest.mark.parametrize(("bits", "std_range"), [(1, 3.0), (2, 3.0), (6, 3.0), (6, 1.0), (11, 3.0)])
def test_levels_are_the_first_nearest_ones(bits, std_range):
    quantizer = DimensionwiseQuantizer(bits, std_range=std_range)
    x = torch.cat((floats(500, scale=2.5), torch.tensor([-9.0, -5, 0, 5, 9])))
    normal = ((x + 5) / 10 * 2 * std_range - std_range).clamp(-std_range, std_range)
    distances = (normal[:, None] - quantizer.reconstruction_values).abs()
    levels = quantizer.encode(x)
    assert levels.dtype == torch.int64 and torch.equal(levels, distances.argmin(dim=1))
    assert torch.equal(quantizer.encode(quantizer.decode(levels)), levels), "quantising twice changes nothing"


def test_tables_are_means_of_equally_likely_bins():
    quantizer = DimensionwiseQuantizer(3)
    sample = floats(400_000).clamp(-3, 3).sort().values.view(8, -1)
    torch.testing.assert_close(quantizer.reconstruction_values, sample.mean(dim=1), atol=0.02, rtol=0)
    assert quantizer.decode(torch.tensor([0, 7])).abs().max() < 5, "the ends of the range are never reached"
    assert quantizer.levels == 8 and len(quantizer.boundaries) == 9
    odd = DimensionwiseQuantizer(levels=12)
    assert odd.levels == 12 and torch.equal(odd.encode(odd.decode(torch.arange(12))), torch.arange(12))


def test_more_bits_lose_less():
    x = floats(2000)
    errors = []
    for bits in range(1, 11):
        quantizer = DimensionwiseQuantizer(bits)
        errors.append((quantizer.decode(quantizer.encode(x)) - x).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


@pytest.mark.parametrize(("kind", "config"), [(KLModel, KL), (MingTok, MING), (FlexTokVAE, FLEX), (TiTokVAE, TITOK)])
@torch.no_grad()
def test_any_continuous_tokenizer(kind, config, tmp_path):
    torch.manual_seed(1)
    continuous = kind(**config).eval()
    model = TokenBridge.quantize(continuous, bits=9, low=-4.0, high=4.0)
    assert model.tokenizer is continuous and model.spec.levels == 512
    assert replace(model.spec, levels=None) == continuous.spec
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    tokens, latents = model.encode(pixels), continuous.encode(pixels)
    assert tokens.shape == latents.shape and tokens.dtype == torch.int64
    torch.testing.assert_close(model.latents(tokens), latents, atol=0.02, rtol=0)
    torch.testing.assert_close(model.decode(tokens), continuous.decode(model.latents(tokens)))
    model.save_pretrained(tmp_path)
    again = open_tokenizer(tmp_path)
    assert isinstance(again, TokenBridge) and isinstance(again.tokenizer, kind)
    assert_same_weights(again, model)
    torch.testing.assert_close(again.decode(tokens), model.decode(tokens), rtol=1e-4, atol=1e-5)
    assert (again.encode(pixels) - tokens).abs().max() <= 1


@torch.no_grad()
def test_noise_reaches_the_posterior():
    torch.manual_seed(3)
    continuous = KLModel(**KL).eval()
    model, pixels, noise = TokenBridge.quantize(continuous), floats(1, 3, 8, 8), floats(1, 16, 3)
    assert torch.equal(model.encode(pixels, noise), model.quantizer.encode(continuous.encode(pixels, noise)))


def test_a_published_file_of_the_continuous_tokenizer():
    torch.manual_seed(4)
    continuous = MingTok(**MING).eval()
    model = TokenBridge.from_original(continuous.state_dict(), {"family": "mingtok", "continuous": MING, "bits": 4})
    assert not model.training and model.spec.levels == 16
    assert all(torch.equal(model.tokenizer.state_dict()[key], value) for key, value in continuous.state_dict().items())
    assert model.quantizer.reconstruction_values.device.type == "cpu"


def test_bad_input():
    model = TokenBridge.quantize(KLModel(**KL), bits=2)
    with pytest.raises(VgenError, match=r"0\.\.3 for this tokenizer, found 0\.\.4"):
        model.decode(torch.tensor([0, 1, 4]).expand(1, 4, 3))
    with pytest.raises(VgenError, match="at least 1 bit"):
        TokenBridge.quantize(KLModel(**KL), bits=0)
    with pytest.raises(VgenError, match="low < high"):
        DimensionwiseQuantizer(low=1.0, high=-1.0)
    with pytest.raises(VgenError, match="vq has discrete tokens"):
        TokenBridge.quantize(VQModel.of_size("emoji-f4"))
    with pytest.raises(VgenError, match="none of vgen's tokenizers"):
        TokenBridge.quantize(torch.nn.Linear(1, 1))
    with pytest.raises(VgenError, match="unknown tokenizer family 'k1'"):
        TokenBridge(family="k1")
    with pytest.raises(VgenError, match="did you mean 'kl-16-6bit'"):
        TokenBridge.from_original({}, "kl-16-6bits")
