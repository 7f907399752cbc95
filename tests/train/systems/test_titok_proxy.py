"""Both stages of the first TiTok models: codes of a VQGAN as targets, then pixels."""

import pytest
import torch
import yaml

from vgen.errors import VgenError
from vgen.tokenizers_vis.maskgit_vqgan import MaskGITVQGAN
from vgen.tokenizers_vis.titok.legacy import TiTokLegacy
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config

PROXY = {"hidden_channels": 8, "channel_mult": (1, 1, 2, 2), "num_res_blocks": 1, "z_channels": 6, "num_embeddings": 11}
MODEL = {
    "size": "s128",
    "image_size": 32,
    "encoder_patch_size": 16,
    "encoder_shape": [16, 1, 2],
    "decoder_shape": [16, 1, 2],
    "num_tokens": 6,
    "channels": 4,
    "codebook_size": 32,
    "usage_window": 64,
}


@pytest.fixture
def proxy(tmp_path):
    torch.manual_seed(0)
    model = MaskGITVQGAN(**PROXY, num_groups=4)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    model.save_pretrained(tmp_path / "vqgan")
    return model.eval()


@pytest.fixture
def config_of(tmp_path, pictures, proxy):
    def make(*overrides):
        content = {
            "version": 1,
            "system": "titok_proxy",
            "out": str(tmp_path / "stage1"),
            "steps": 4,
            "batch_size": 4,
            "log_every": 2,
            "evaluate_every": 2,
            "preview_every": 4,
            "tensorboard": False,
            "proxy": str(tmp_path / "vqgan"),
            "data": {"path": str(pictures), "size": 32},
            "model": MODEL,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


def test_stage_1_leaves_the_vqgan_alone_and_learns_its_codes(config_of, proxy):
    trainer = Trainer(config_of("optimizer.lr=3e-3", "optimizer.warmup_steps=0", "steps=100", "ema_decay=0"))
    system, batches = trainer.system, trainer.system.batches(0, 0, 1)
    before = system.evaluate(0)
    for step in range(30):
        trainer.step(step, batches)
    after = system.evaluate(30)
    assert after["cross_entropy"] < 0.8 * before["cross_entropy"] and after["accuracy"] > before["accuracy"]
    assert 0 < after["codes_used"] <= 32 and after["psnr"] > 0
    for name, value in proxy.decoder.state_dict().items():
        assert torch.equal(system.model.pixel_decoder.state_dict()[name], value)


def test_both_stages(tmp_path, config_of, proxy):
    first = train(config_of("loss.restart_every=1", "loss.restart_until=1"))
    assert first.figures["cross_entropy"] > 0
    model = TiTokLegacy.from_pretrained(first.model)
    assert model.config.proxy_codes == 11 and model.config.decoder_patch_size == 8
    assert torch.equal(model.pixel_quantize.embedding.weight, proxy.quantize.embedding.weight)

    path = tmp_path / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    del content["proxy"]
    names = ("proxy_codes", "pixel_width", "pixel_mult", "pixel_blocks", "pixel_channels", "num_groups")
    model_config = {**MODEL, "decoder_patch_size": 8, **{name: model.config[name] for name in names}}
    content |= {
        "system": "tokenizer",
        "family": "titok_legacy",
        "out": str(tmp_path / "stage2"),
        "model": {name: list(value) if isinstance(value, tuple) else value for name, value in model_config.items()},
        "start": {"model": str(first.model), "freeze_codes": True},
        "loss": {"disc_start": 2, "disc_width": 4, "disc_layers": 2},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    second = TiTokLegacy.from_pretrained(train(load_config(path)).model)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(model.encode(pixels), second.encode(pixels))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, second.state_dict()[name])}
    moved.discard("quantize.codebook_used")
    assert {name.split(".")[0] for name in moved} == {"decoder", "pixel_decoder", "pixel_quantize"}


@pytest.mark.parametrize(
    "override, words",
    [
        ("proxy=/nowhere", "/nowhere does not exist"),
        ("proxy=null", "proxy"),
        ("model.decoder_shape=[16,1,3]", "multiple of the 3 heads"),
        ("data.size=64", "takes 1x32x32"),
    ],
)
def test_bad_settings(config_of, override, words):
    with pytest.raises(VgenError) as error:
        config_of(override)
    assert words in str(error.value)


def test_another_tokenizer_is_no_proxy(tmp_path, config_of, tokenizer):
    with pytest.raises(VgenError, match="holds a VQModel, expected a MaskGITVQGAN"):
        config_of(f"proxy={tmp_path / 'tokenizer'}")
