"""Training a FlexTok: from pictures to a model, exact resume, alignment, any VAE below, settings that cannot work."""

import json

import pytest
import torch
import yaml
from PIL import Image

from vgen.errors import VgenError
from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.tokenizers_vis.flextok.vae import FlexTokVAE
from vgen.tokenizers_vis.kl import KLModel
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config

MODEL = {
    "size": "emoji-pixels",
    "encoder_width": 16,
    "encoder_depth": 1,
    "decoder_width": 16,
    "decoder_depth": 2,
    "head_dim": 8,
    "registers": 4,
    "levels": [5, 4],
    "max_grid": [4, 4],
    "frequencies": 8,
}
TINY_KL = {
    "ch": 8,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 4,
    "num_groups": 4,
    "encoder_attention": [],
}


@pytest.fixture
def config_of(tmp_path, pictures):
    def make(*overrides):
        content = {
            "version": 1,
            "system": "flextok",
            "out": str(tmp_path / "run"),
            "steps": 4,
            "batch_size": 4,
            "log_every": 2,
            "evaluate_every": 2,
            "preview_every": 4,
            "tensorboard": False,
            "data": {"path": str(pictures), "size": 32},
            "model": MODEL,
            "sampling": {"steps": 2, "evaluate_steps": 1, "evaluate_images": 3, "preview_images": 2},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


@pytest.fixture
def kl_folder(tmp_path):
    KLModel(**TINY_KL).save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def entries(tmp_path, kind):
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def test_a_run_from_pictures_to_a_model(tmp_path, config_of, kl_folder):
    summary = train(config_of("precision=bf16", f"model.vae={kl_folder}", "model.patch_size=4"))
    assert {"loss", "flow", "usage", "grad_norm_flextok"} <= entries(tmp_path, "train")[0].keys()
    held_out = entries(tmp_path, "held_out")[-1]
    assert {"flow", "codes_used", "code_perplexity", "psnr_1", "psnr_2", "psnr_4"} <= held_out.keys()
    assert 0 < held_out["codes_used"] <= 20
    model = FlexTok.from_pretrained(summary.model)
    original = KLModel.from_pretrained(kl_folder).state_dict()
    assert all(torch.equal(value, original[key]) for key, value in model.vae.state_dict().items()), "the VAE stays"
    assert model.config.steps == 2 and model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    with Image.open(tmp_path / "run" / "previews" / "step_00000004.png") as sheet:
        assert sheet.width > sheet.height  # 2 rows of 4
    weights = (tmp_path / "run" / "checkpoints").rglob("flextok.safetensors")
    assert all(path.stat().st_size < 200_000 for path in weights), "checkpoints leave the VAE out"


def test_resume_is_exact(tmp_path, config_of):
    def weights(folder):
        return {key: value.numpy().tobytes() for key, value in FlexTok.from_pretrained(folder).state_dict().items()}

    quick = ("evaluate_every=0", "preview_every=0")
    whole = weights(train(config_of(f"out={tmp_path / 'whole'}", *quick)).model)
    stopped = train(config_of("time_limit_minutes=1e-9", *quick))
    while not stopped.finished:
        stopped = train(config_of("time_limit_minutes=1e-9", *quick))
    assert weights(stopped.model) == whole


def test_features_can_be_aligned_with_a_teacher(tmp_path, config_of):
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**settings)).save_pretrained(tmp_path / "teacher")
    config = config_of(
        f"loss.alignment_model={tmp_path / 'teacher'}", "loss.alignment_size=21", "loss.alignment_hidden=8"
    )
    trainer = Trainer(config)
    (loss,) = trainer.system.losses(next(trainer.system.batches(0, 0, 1)), 0, torch.Generator().manual_seed(0))
    assert 0 < loss.logs["alignment"] < 2
    assert loss.value.item() == pytest.approx((loss.logs["flow"] + loss.logs["alignment"]).item(), rel=1e-5)
    trainer.export(tmp_path / "model")  # without the head
    assert FlexTok.from_pretrained(tmp_path / "model").config.registers == 4
    with pytest.raises(VgenError, match="multiple of its patch 7"):
        Trainer(config_of(f"loss.alignment_model={tmp_path / 'teacher'}", "loss.alignment_size=20", "out=other"))


def test_a_vae_of_diffusers_is_a_latent_space(tmp_path, config_of):
    options = {"latent_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    FlexTokVAE(**options).vae.save_pretrained(tmp_path / "autoencoder")
    config = config_of(f"model.vae={tmp_path / 'autoencoder'}", "model.vae_scale=0.5", "model.patch_size=4")
    system = Trainer(config).system
    assert system.model.config.vae_family == "flextok_vae" and system.model.vae.config.scale == 0.5


@pytest.mark.parametrize("times", ["logit-normal", "logit-normal-spread"])
def test_other_times(config_of, times):
    trainer = Trainer(config_of(f"loss.times={times}"))
    (loss,) = trainer.system.losses(next(trainer.system.batches(0, 0, 1)), 0, torch.Generator().manual_seed(0))
    assert torch.isfinite(loss.value)


def test_collapse_is_said(config_of):
    trainer = Trainer(config_of("model.levels=[8,8]"))
    system = trainer.system
    system.usage[3] = 4000
    (message,) = system.after_step(1, torch.Generator(), {})
    assert message.startswith("warning: the tokens have collapsed: 1 of 64 codes")
    system.usage.fill_(200)
    assert system.after_step(3, torch.Generator(), {}) == [] and system.after_step(2, torch.Generator(), {}) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path=/nowhere", "/nowhere does not exist"),
        ("data.size=30", "multiples of 8"),
        ("data.size=40", "up to 32x32"),
        ("loss.keep=pow", "did you mean 'pow2'"),
        ("loss.times=logitnormal", "did you mean 'logit-normal'"),
        ("loss.null_dropout=2", "loss.null_dropout must lie in"),
        ("model.size=emoji-f9", "did you mean 'emoji-f8'"),
        ("model.head_dim=5", "multiple of the head size 5"),
        ("model.vae=/nowhere", "/nowhere does not exist"),
        ("model.levels=[1]", "at least 2 levels"),
        ("sampling.counts=[1,5]", r"1..4, the number of registers, found 5"),
        ("sampling.steps=0", "sampling.steps must be above 0"),
    ],
)
def test_settings_that_cannot_work(config_of, override, words):
    with pytest.raises(VgenError) as error:
        config_of(override)
    assert words in str(error.value)
