"""TiTok in all its forms: the contract, text, files, the first models' quirks, bad input."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from vgen.errors import VgenError
from vgen.tokenizers_vis.maskgit_vqgan import MaskGITVQGAN
from vgen.tokenizers_vis.registry import open_tokenizer
from vgen.tokenizers_vis.titok.legacy import SIZES as LEGACY_SIZES
from vgen.tokenizers_vis.titok.legacy import TiTokLegacy
from vgen.tokenizers_vis.titok.titok import VAE_SIZES, VQ_SIZES, TiTokVAE, TiTokVQ

SHAPES = {"encoder_shape": (16, 1, 2), "decoder_shape": (24, 1, 3), "image_size": 16, "num_tokens": 5}
TINY = {**SHAPES, "encoder_patch_size": 8, "decoder_patch_size": 4}
TEXT = {"text_tokens": 3, "text_width": 7}
VQ = {**TINY, "channels": 4, "codebook_size": 19}
VAE = {**TINY, "channels": 4, "scale": 0.5}
PROXY = {"hidden_channels": 8, "channel_mult": (1, 1, 2), "num_res_blocks": 1, "z_channels": 6, "num_embeddings": 11}
LEGACY = {
    **VQ,
    "proxy_codes": 11,
    "pixel_width": 8,
    "pixel_mult": (1, 1, 2),
    "pixel_blocks": 1,
    "pixel_channels": 6,
    "num_groups": 4,
}
MODELS = {
    "vq": lambda: TiTokVQ(**VQ),
    "ta-vq": lambda: TiTokVQ(**VQ, **TEXT),
    "vae": lambda: TiTokVAE(**VAE),
    "ta-vae": lambda: TiTokVAE(**VAE, **TEXT),
    "legacy": lambda: TiTokLegacy(**LEGACY),
}


def make(name: str):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def condition(model, batch: int = 2) -> torch.Tensor | None:
    text = torch.randn(batch, 3, 7, generator=torch.Generator().manual_seed(2))
    return text if model.config.get("text_tokens", 0) else None


@torch.no_grad()
def test_pictures_to_tokens_and_back(model):
    pixels, text = pictures(), condition(model)
    tokens = model.encode(pixels)
    discrete = model.spec.vocabulary is not None
    assert tokens.shape == ((2, 5) if discrete else (2, 5, 4)) and model.spec.grid(16, 16) == (1, 1, 5)
    assert model.spec.pixels((1, 1, 5)) == (1, 16, 16)
    made = model.decode(tokens, grid=(1, 1, 5), condition=text)
    assert made.shape == pixels.shape
    forward = model(pixels) if text is None else model(pixels, condition=text)
    torch.testing.assert_close(made, forward.reconstruction)
    torch.testing.assert_close(model.encode(pixels[1:]), tokens[1:])  # a picture does not see its batch
    one = model.decode(tokens[1:], condition=None if text is None else text[1:])
    torch.testing.assert_close(one, made[1:], atol=1e-5, rtol=1e-5)


def test_gradients_reach_everything_that_trains(model):
    model.train()
    text = condition(model)
    output = model(pictures()) if text is None else model(pictures(), condition=text)
    loss = output.reconstruction.square().mean()
    loss = loss + (
        output.posterior.kl().mean() if output.quantized is None else sum(output.quantized.losses().values())
    )
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_a_saved_model_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = open_tokenizer(tmp_path)
    assert type(again) is type(model) and again.spec == model.spec
    tokens, text = model.encode(pictures()), condition(model)
    assert torch.equal(again.decode(tokens, condition=text), model.decode(tokens, condition=text))


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = make("vq").train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.encoder.gradient_checkpointing and model.decoder.gradient_checkpointing
        model(pictures()).reconstruction.square().mean().backward()
        grads.append(model.latent_tokens.grad)
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_the_caption_changes_the_picture_and_its_padding_counts():
    model = make("ta-vq")
    tokens, text = model.encode(pictures()), condition(model)
    other = text.clone()
    other[:, -1] += 1
    assert not torch.allclose(model.decode(tokens, condition=text), model.decode(tokens, condition=other))


@torch.no_grad()
def test_the_noise_of_a_posterior_is_injectable():
    model = make("vae")
    pixels = pictures()
    noise = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))
    posterior = model.posterior(pixels)
    sample = posterior.mean + (posterior.log_variance / 2).exp() * rearrange(noise, "b n c -> b c 1 n")
    torch.testing.assert_close(model.encode(pixels, noise), rearrange(sample, "b c 1 n -> b n c") * 0.5)
    scale = model.calibrate(pixels)
    found = model.encode(pixels, noise)
    assert model.config.scale == scale and 0.5 < found.std().item() < 2
    torch.testing.assert_close(model.decode(found), model.reconstruct(sample))


@torch.no_grad()
def test_the_first_models_mix_latents_where_later_ones_do_not():
    features = torch.randn(1, 5, 16)
    encoder = make("legacy").encoder
    straight, mixed = encoder.project(features), encoder.project_reinterpreted(features)
    weight, bias = encoder.conv_out.weight[:, :, 0, 0], encoder.conv_out.bias
    flat = features[0].flatten()
    for n in range(5):
        torch.testing.assert_close(straight[0, :, 0, n], weight @ features[0, n] + bias)
        torch.testing.assert_close(mixed[0, :, 0, n], weight @ flat[n::5] + bias)


@torch.no_grad()
def test_a_stage_1_file_takes_its_pixel_half_from_the_vqgan(tmp_path):
    whole = make("legacy")
    vqgan = MaskGITVQGAN(**PROXY, num_groups=4)
    half = {name: value for name, value in whole.state_dict().items() if not name.startswith("pixel_")}
    torch.save(half, tmp_path / "stage1.bin")
    torch.save(vqgan.state_dict(), tmp_path / "vqgan.bin")
    model = TiTokLegacy.from_original(tmp_path / "stage1.bin", LEGACY, vqgan=tmp_path / "vqgan.bin")
    assert torch.equal(model.pixel_decoder.conv_in.weight, vqgan.decoder.conv_in.weight)
    assert torch.equal(model.pixel_quantize.embedding.weight, vqgan.quantize.embedding.weight)
    assert torch.equal(model.encode(pictures()), whole.encode(pictures()))
    with pytest.raises(VgenError, match=r"of stage 1.*vqgan="):
        TiTokLegacy.from_original(tmp_path / "stage1.bin", LEGACY)


def test_files_may_have_or_lack_the_codebooks_bookkeeping(tmp_path):
    state = make("vq").state_dict()
    assert "quantize.codebook_used" not in state, "the published files have no usage queue"
    state["quantize.embed_prob"] = torch.rand(19)
    torch.save(state, tmp_path / "model.bin")
    assert not hasattr(TiTokVQ.from_single_file(tmp_path / "model.bin", VQ).quantize, "embed_prob")
    trained = TiTokVQ.from_original(state, {**VQ, "clustering": True, "usage_window": 8})
    assert torch.equal(trained.quantize.embed_prob, state["quantize.embed_prob"])
    assert trained.quantize.codebook_used.tolist() == [0] * 8


def test_sizes_are_the_published_ones():
    assert set(VQ_SIZES) >= {"bl64", "bl128", "sl256", "ta-bl32", "ta-bl64", "ta-bl128"}
    assert set(VAE_SIZES) >= {"ll32", "bl64", "bl128", "ta-bl32", "ta-bl64", "ta-sl128"}
    assert set(LEGACY_SIZES) == {"l32", "b64", "s128"}
    with torch.device("meta"):
        spec = TiTokVQ.of_size("sl256").spec
    assert spec.grid(256, 256) == (1, 1, 256) and spec.vocabulary == 8192
    with pytest.raises(VgenError, match="did you mean 'ta-bl64'"):
        TiTokVAE.of_size("ta-bl46")


def test_bad_input():
    vq, vae, ta = make("vq"), make("vae"), make("ta-vq")
    codes, latents = torch.zeros(1, 5, dtype=torch.long), torch.randn(1, 5, 4)
    with pytest.raises(VgenError, match=r"takes 1x16x16 .* got 1x16x32"):
        vq.encode(torch.zeros(1, 3, 16, 32))
    with pytest.raises(VgenError, match="frames as a batch"):
        vq.encode(torch.zeros(1, 3, 2, 16, 16))
    with pytest.raises(VgenError, match=r"decodes 5 tokens.*got 4 tokens"):
        vq.decode(codes[:, :4])
    with pytest.raises(VgenError, match=r"grid 1x1x5, got 5 tokens on a grid 1x5x1"):
        vq.decode(codes, grid=(1, 5, 1))
    with pytest.raises(VgenError, match=r"0\.\.18"):
        vq.decode(codes + 19)
    with pytest.raises(VgenError, match="no steps"):
        vq.decode(codes, steps=2)
    with pytest.raises(VgenError, match="takes no text"):
        vq.decode(codes, condition=torch.zeros(1, 3, 7))
    with pytest.raises(VgenError, match=r"CLIP features as condition, \[1, 3, 7\], got none"):
        ta.decode(codes)
    with pytest.raises(VgenError, match="deviation of about 1"):
        vae.decode(latents * 30)
    with pytest.raises(VgenError, match="shape of the latents"):
        vae.encode(pictures(1), noise=torch.zeros(1, 4, 1, 5))
    with pytest.raises(VgenError, match="multiple of the patch size 8; use 16 or 24"):
        TiTokVQ(**{**VQ, "image_size": 20})
    with pytest.raises(VgenError, match="multiple of the 3 heads"):
        TiTokVQ(**{**VQ, "encoder_shape": (16, 1, 3)})
    with pytest.raises(VgenError, match="pixel_mult needs"):
        TiTokLegacy(**{**LEGACY, "pixel_mult": (1, 2)})
    with pytest.raises(VgenError, match="does not fit TiTokVQ"):
        TiTokVQ.from_original(vae.state_dict(), VQ)
