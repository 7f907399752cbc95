"""Training a MingTok: from pictures to a model, exact resume, masks, teachers, settings that cannot work."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from vgen.data.caching import cache_tokens
from vgen.data.tokens import TokenDataset
from vgen.errors import VgenError
from vgen.settings import merge, read_yaml
from vgen.tokenizers_vis.mingtok.mingtok import MingTok
from vgen.tokenizers_vis.registry import open_tokenizer
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config
from vgen.train.systems.mingtok import Config
from vgen.train.systems.pictures import make_model

MODEL = {
    "size": "emoji-f8",
    "image_size": 32,
    "latent_channels": 4,
    "encoder_width": 64,
    "encoder_depth": 1,
    "semantic_width": 64,
    "semantic_depth": 1,
    "pixel_width": 64,
    "pixel_depth": 1,
}
MASKED = ("loss.masked_share=0.5", "loss.mask_ratio=0.5")


@pytest.fixture
def config_of(tmp_path, pictures):
    def make(*overrides):
        content = {
            "version": 1,
            "system": "mingtok",
            "out": str(tmp_path / "run"),
            "steps": 4,
            "batch_size": 4,
            "log_every": 2,
            "evaluate_every": 2,
            "preview_every": 4,
            "tensorboard": False,
            "data": {"path": str(pictures), "size": 32},
            "model": MODEL,
            "loss": {"perceptual_weight": 0.1, "head_width": 8},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


def entries(tmp_path, kind):
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


@pytest.mark.parametrize("masks", [(), MASKED])
def test_a_run_from_pictures_to_a_model(tmp_path, config_of, pictures, masks):
    summary = train(config_of("precision=bf16", *masks))
    logged, held_out = entries(tmp_path, "train")[-1], entries(tmp_path, "held_out")[-1]
    assert {"reconstruction", "perceptual", "latent_mean", "latent_std", "latent_between"} <= logged.keys()
    assert {"psnr", "ssim", "latent_std", "latent_between", "psnr_train"} <= held_out.keys()
    assert (tmp_path / "run" / "previews" / "step_00000004.png").is_file()
    model = open_tokenizer(summary.model)
    assert isinstance(model, MingTok) and "mask_token" not in dict(model.named_parameters())
    # The exported scale is that of the training pictures.
    cache_tokens(summary.model, pictures, tmp_path / "tokens", size=32, say=str)
    cached = TokenDataset(tmp_path / "tokens" / "train.safetensors")
    assert cached.spec.channels == 4 and cached.tokens.float().std() == pytest.approx(1, abs=0.05)
    assert cached.tokens.float().mean() == pytest.approx(0, abs=0.05)


def test_stopped_after_every_step_it_reaches_the_same_weights(tmp_path, config_of):
    def weights(folder):
        return {key: value.numpy().tobytes() for key, value in open_tokenizer(folder).state_dict().items()}

    quick = ("steps=3", "evaluate_every=0", "preview_every=0", *MASKED)
    whole = weights(train(config_of(f"out={tmp_path / 'whole'}", *quick)).model)
    while not (stopped := train(config_of("time_limit_minutes=1e-9", *quick))).finished:
        pass
    assert weights(stopped.model) == whole


def test_teachers_are_predicted_where_the_input_is_masked(tmp_path, config_of):
    transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**shape)).save_pretrained(tmp_path / "dino")
    vision = {**shape, "intermediate_size": 16}
    text = {**vision, "vocab_size": 8, "max_position_embeddings": 4}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    teachers = (
        f"loss.latent_teacher={tmp_path / 'dino'}",
        "loss.latent_size=21",
        f"loss.semantic_teacher={tmp_path / 'clip'}",
    )
    trainer = Trainer(config_of(*teachers, "loss.semantic_size=28", "loss.semantic_weight=2", *MASKED))
    (loss,) = trainer.system.losses(next(trainer.system.batches(0, 0, 1)), 0, torch.Generator().manual_seed(1))
    logs = loss.logs
    assert 0 < logs["latent_teacher"] < 2 and 0 < logs["semantic_teacher"] < 2
    expected = logs["reconstruction"] + 0.1 * logs["perceptual"] + logs["latent_teacher"] + 2 * logs["semantic_teacher"]
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.export(tmp_path / "model")  # without heads
    assert isinstance(open_tokenizer(tmp_path / "model"), MingTok)
    with pytest.raises(VgenError, match=r"the teacher .*nowhere cannot be loaded"):
        Trainer(config_of(f"loss.latent_teacher={tmp_path / 'nowhere'}", *MASKED, "out=other"))
    with pytest.raises(VgenError, match="takes pictures of 28 pixels a side, got 21"):
        Trainer(config_of(*teachers, "loss.semantic_size=21", *MASKED, "out=other"))


def test_collapse_is_said(config_of):
    system = Trainer(config_of()).system
    system.latent.latest = torch.tensor(0.002)
    (message,) = system.after_step(1, torch.Generator(), {})
    assert message.startswith("warning: only 0.20% of the latents' variance lies between pictures")
    system.latent.latest = torch.tensor(0.2)
    assert system.after_step(1, torch.Generator(), {}) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.size=36", "multiple of 8"),
        ("model.size=emoji-f9", "did you mean 'emoji-f8'"),
        ("model.encoder_width=65", "multiples of its head size 64"),
        ("model.pixel_patch_size=3", "multiple of pixel_patch_size 3"),
        ("loss.reconstruction=L1-plian", "did you mean 'L1-plain'"),
        ("loss.perceptual=lpips", "needs the file loss.lpips_vgg"),
        ("loss.masked_share=2", "loss.masked_share must lie in [0, 1]"),
        ("loss.mask_ratio=1", "loss.mask_ratio must lie in [0, 1)"),
        ("loss.latent_teacher=facebook/dinov2-small", "set loss.masked_share and loss.mask_ratio above 0"),
        ("loss.head_width=0", "loss.head_width must be above 0"),
    ],
)
def test_settings_that_cannot_work(config_of, override, words):
    with pytest.raises(VgenError) as error:
        config_of(override)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["mingtok/vision", "emoji/mingtok"])
def test_models_of_committed_configs_can_be_made(name):
    config = merge(Config, read_yaml(Path(__file__).parents[3] / "configs" / f"{name}.yaml"))
    with torch.device("meta"):
        model = make_model(config)
    assert (model.config.latent_mean, model.config.latent_scale) == (0, 1), "measured at export"
    model.spec.grid(config.data.size, config.data.size)
