import json

import pytest
import torch
from PIL import Image

from vgen.data import caching
from vgen.data.caching import cache_tokens
from vgen.data.dataset import open_images
from vgen.data.tokens import TokenDataset, TokenSetSpec
from vgen.errors import VgenError
from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.titok.titok import TiTokVQ


def test_tokens_are_those_of_the_tokenizer(tmp_path, pictures, tokenizer):
    said = []
    reports = cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "out", size=32, batch_size=5, say=said.append)
    assert [r.split for r in reports] == ["train", "heldout"] and [r.images for r in reports] == [12, 6]
    assert "12 pictures found, 12 used; 12 labelled (2 classes); 12 captions" in said[0]
    assert "of 32 codes in use" in said[1] and " dB" in said[1]
    cached, images = TokenDataset(tmp_path / "out" / "train.safetensors"), open_images(pictures, "train", 32)
    assert cached.grid == (1, 4, 4) and cached.vocabulary == 32 and cached.class_names == ("blue", "red")
    with torch.no_grad():
        expected = tokenizer.encode(torch.stack([images[i]["image"] for i in range(12)]))
    assert torch.equal(torch.stack([cached[i]["tokens"] for i in range(12)]), expected)
    assert [cached[i]["caption"] for i in range(12)] == images.captions and cached.labels == images.labels
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == [".vgen.lock"]


def test_views(tmp_path, pictures, tokenizer):
    cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "out", size=32, flips=True, variants=2)
    cached, images = TokenDataset(tmp_path / "out" / "train.safetensors"), open_images(pictures, "train", 32)
    assert cached.variants == 4 and TokenDataset(tmp_path / "out" / "heldout.safetensors").variants == 1
    with torch.no_grad():
        mirrored = tokenizer.encode(torch.stack([images[i]["image"] for i in range(12)]).flip(-1))
    assert torch.equal(cached.tokens[:, 1].long(), mirrored)
    assert not torch.equal(cached.tokens[:, 2], cached.tokens[:, 3])


def test_ten_crops(tmp_path, pictures, tokenizer):
    cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "out", size=32, ten_crop=1.25)
    cached, larger = TokenDataset(tmp_path / "out" / "train.safetensors"), open_images(pictures, "train", 40)
    assert cached.variants == 11
    pixels = torch.stack([larger[i]["image"] for i in range(12)])
    views = {
        1: pixels[..., :32, :32],
        4: pixels[..., 8:, 8:],
        5: pixels[..., 4:36, 4:36],
        7: pixels[..., :32, 8:].flip(-1),
    }
    with torch.no_grad():
        for variant, view in views.items():
            assert torch.equal(cached.tokens[:, variant].long(), tokenizer.encode(view))
    with pytest.raises(VgenError, match=r"range above 1 such as 1\.1, found 0\.9"):
        cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "other", size=32, ten_crop=0.9)


def test_pictures_that_are_not_square(tmp_path, pictures, tokenizer, vae):
    size, views = (16, 32), {"flips": True, "variants": 1, "ten_crop": 1.25}
    cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "out", size=size, **views, say=str)
    cached, images = TokenDataset(tmp_path / "out" / "train.safetensors"), open_images(pictures, "train", size)
    larger = open_images(pictures, "train", (20, 40))
    assert cached.grid == (1, 2, 4) and cached.variants == 13 and cached.spec.size is None, "the grid says it"
    plain, whole = (torch.stack([data[i]["image"] for i in range(12)]) for data in (images, larger))
    with torch.no_grad():
        for variant, view in ((0, plain), (1, plain.flip(-1)), (4, whole[..., :16, 8:]), (7, whole[..., 2:18, 4:36])):
            assert torch.equal(cached.tokens[:, variant].long(), tokenizer.encode(view))
    cache_tokens(tmp_path / "vae", pictures, tmp_path / "latents", size=size, low_res=(8, 16), say=str)
    spec = TokenDataset(tmp_path / "latents" / "train.safetensors").spec
    assert spec == TokenSetSpec((1, 2, 4), None, 4, (1, 1, 2))
    with pytest.raises(VgenError, match="1 to 15x31 pixels a side, got --low-res 16"):
        cache_tokens(tmp_path / "vae", pictures, tmp_path / "latents", size=size, low_res=16)


def test_a_square_has_one_identity(tmp_path, pictures, tokenizer):
    """Caches of before sizes had two sides are kept."""
    said = []
    for size in (32, (32, 32)):
        cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "out", size=size, say=said.append)
    assert sum("kept: same pictures" in line for line in said) == 2
    assert [caching._side(size) for size in (None, (32, 32), (16, 32))] == [0, 32, (16, 32)]


def test_interrupted_it_continues_and_finished_splits_are_kept(tmp_path, pictures, tokenizer, monkeypatch):
    monkeypatch.setattr(caching, "PART", 5)
    calls = []
    encode = caching._encode

    def counting(tokenizer, dataset, views, indices, *rest):
        if len(calls) == 2:
            calls.clear()
            raise KeyboardInterrupt
        calls.append(indices)
        return encode(tokenizer, dataset, views, indices, *rest)

    monkeypatch.setattr(caching, "_encode", counting)
    arguments = (tmp_path / "tokenizer", pictures, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        cache_tokens(*arguments, size=32)
    assert not (tmp_path / "out" / "train.safetensors").exists()
    calls.append(range(0))  # the counter would otherwise interrupt again
    monkeypatch.setattr(caching, "_encode", lambda *a: (calls.append(a[3]), encode(*a))[1])
    first = cache_tokens(*arguments, size=32)
    assert calls[1] == range(10, 12)  # the third part of the training split: two were done
    done = len(calls)
    assert cache_tokens(*arguments, size=32) == first and len(calls) == done
    cache_tokens(*arguments, size=64)  # other settings: made anew
    assert len(calls) > done and TokenDataset(tmp_path / "out" / "train.safetensors").grid == (1, 8, 8)


def test_unreadable_pictures_are_skipped(tmp_path, pictures, tokenizer):
    (pictures / "train" / "red" / "3.png").write_bytes(b"no picture")
    report = cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "out", size=32)[0]
    assert (report.images, report.skipped) == (11, 1)
    cached = TokenDataset(tmp_path / "out" / "train.safetensors")
    assert "red square number 3" not in cached.captions and len(cached) == 11


def test_bad_input_is_one_sentence(tmp_path, pictures, tokenizer):
    good = tmp_path / "tokenizer"
    with pytest.raises(VgenError, match="holds no tokenizer"):
        cache_tokens(pictures, pictures, tmp_path / "out", size=32)
    with pytest.raises(VgenError, match="such as --size 64"):
        cache_tokens(good, pictures, tmp_path / "out")
    with pytest.raises(VgenError, match="multiple of 8"):
        cache_tokens(good, pictures, tmp_path / "out", size=30)
    with pytest.raises(VgenError, match="variants >= 0"):
        cache_tokens(good, pictures, tmp_path / "out", size=32, variants=-1)
    config = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps({**config, "_class_name": "AnyOrderModel"}))
    with pytest.raises(VgenError, match="holds a AnyOrderModel"):
        cache_tokens(good, pictures, tmp_path / "out", size=32)


@pytest.fixture
def vae(tmp_path):
    """A tiny KL model (8x8 pixels a latent of 4 channels), saved in tmp_path / "vae"."""
    torch.manual_seed(0)
    model = KLModel(ch=8, ch_mult=(1,), num_res_blocks=1, latent_channels=4, num_groups=4, patch_size=8, scale=1.0)
    model.save_pretrained(tmp_path / "vae")
    return model.eval()


def test_a_continuous_tokenizer_gives_its_posteriors_also_of_smaller_pictures(tmp_path, pictures, vae):
    (report, _) = cache_tokens(tmp_path / "vae", pictures, tmp_path / "out", size=32, flips=True, low_res=16)
    assert "latents of mean" in report.tokens
    cached, images = TokenDataset(tmp_path / "out" / "train.safetensors"), open_images(pictures, "train", 32)
    assert cached.spec == TokenSetSpec((1, 4, 4), None, 4, (1, 2, 2)) and cached.variants == 2
    mirrored = torch.stack([images[i]["image"].flip(-1) for i in range(12)]).split(4)
    with torch.no_grad():  # by fours, as small pictures on every CPU
        mean, deviation = (torch.cat(part) for part in zip(*map(vae.moments, mirrored)))
        small = [torch.nn.functional.interpolate(four, (16, 16), mode="bicubic") for four in mirrored]
        low = torch.cat([vae.moments(four)[0] for four in small])
    assert torch.equal(cached.tensors["tokens"][:, 1], mean.half())
    assert torch.equal(cached.tensors["deviations"][:, 1], deviation.half())
    assert torch.equal(cached.tensors["low"][:, 1], low.half())


def test_latents_are_the_same_bytes_at_every_batch_size(tmp_path):
    torch.manual_seed(3)
    folder = tmp_path / "drawn" / "train"
    folder.mkdir(parents=True)
    for number in range(5):
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    made = []
    for size in (1, 2, 5):
        out = tmp_path / f"out{size}"
        cache_tokens("emoji-kl", folder.parent, out, size=64, low_res=32, held_out=None, batch_size=size)
        made.append((out / "train.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


def test_moments_are_those_of_encode(vae):
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mean, deviation = vae.moments(pixels)
        assert torch.equal(mean, vae.encode(pixels))
        assert torch.allclose(mean + deviation * noise, vae.encode(pixels, noise), atol=1e-6)


def test_smaller_pictures_are_for_continuous_tokenizers(tmp_path, pictures, tokenizer):
    with pytest.raises(VgenError, match="for continuous tokenizers"):
        cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "out", size=32, low_res=16)


@pytest.mark.parametrize("low_res", [-8, 32, 40])
def test_smaller_pictures_are_smaller(tmp_path, pictures, vae, low_res):
    with pytest.raises(VgenError, match=f"1 to 31 pixels a side, got --low-res {low_res}"):
        cache_tokens(tmp_path / "vae", pictures, tmp_path / "out", size=32, low_res=low_res)


def test_a_decoder_that_reads_captions_is_not_asked(tmp_path, pictures):
    """TA-TiTok codes pictures without a caption, and decodes none without."""
    shapes = {
        "image_size": 32,
        "encoder_shape": (16, 1, 2),
        "decoder_shape": (16, 1, 2),
        "num_tokens": 6,
        "channels": 4,
    }
    patches = {"encoder_patch_size": 8, "decoder_patch_size": 8, "codebook_size": 16, "text_tokens": 3, "text_width": 8}
    TiTokVQ(**shapes, **patches).save_pretrained(tmp_path / "titok")
    said = []
    reports = cache_tokens(tmp_path / "titok", pictures, tmp_path / "out", size=32, say=said.append)
    assert [report.psnr for report in reports] == [None, None] and "round trip" not in said[1]
    assert TokenDataset(tmp_path / "out" / "train.safetensors").grid == (1, 1, 6)


def test_a_costly_decoder_is_asked_for_some_pictures(tmp_path, pictures, monkeypatch):
    shape = {
        "encoder_width": 16,
        "encoder_depth": 1,
        "decoder_width": 16,
        "decoder_depth": 1,
        "head_dim": 8,
        "registers": 4,
    }
    options = {"levels": [5, 4], "max_grid": [4, 4], "frequencies": 8, "steps": 2, "guidance": 1.0}
    FlexTok.of_size("emoji-pixels", **shape, **options).save_pretrained(tmp_path / "flextok")
    monkeypatch.setattr(caching, "CHECKED", 4)
    asked = []
    round_trip = caching.Coder.round_trip
    monkeypatch.setattr(
        caching.Coder,
        "round_trip",
        lambda self, pixels, tokens: asked.append(len(pixels)) or round_trip(self, pixels, tokens),
    )
    reports = cache_tokens(tmp_path / "flextok", pictures, tmp_path / "out", size=32, batch_size=4, say=str)
    assert asked == [4, 4] and [report.images for report in reports] == [12, 6]
    # Pictures smaller than the largest come back in their own size.
    small = cache_tokens(tmp_path / "flextok", pictures, tmp_path / "small", size=(16, 24), batch_size=4, say=str)
    assert asked[2:] == [4, 4] and all(0 < report.psnr < 60 for report in small)
    # Nothing but this says what the tokens are of.
    assert TokenDataset(tmp_path / "small" / "train.safetensors").spec.size == (16, 24)
