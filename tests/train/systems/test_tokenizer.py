import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from train.neutral import changed_by_looking

from vgen.errors import VgenError
from vgen.models.conditions.clip import ClipFeatures
from vgen.settings import merge, read_yaml
from vgen.tokenizers_vis.registry import open_tokenizer
from vgen.tokenizers_vis.titok.legacy import pixel_half
from vgen.tokenizers_vis.vq import VQModel
from vgen.train.checkpoint import checkpoints
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config
from vgen.train.systems import pictures as pictures_module
from vgen.train.systems.pictures import make_model
from vgen.train.systems.tokenizer import Config

MODEL = {
    "size": "emoji-f8",
    "ch": 8,
    "encoder_ch_mult": [1, 2],
    "decoder_ch_mult": [1, 2],
    "z_channels": 8,
    "codebook_size": 64,
    "num_groups": 4,
    "patch_size": 4,
    "usage_window": 128,
}
SHAPES = {"image_size": 32, "encoder_shape": [16, 1, 2], "decoder_shape": [16, 1, 2], "num_tokens": 6, "channels": 4}
PATCHES = {"encoder_patch_size": 8, "decoder_patch_size": 8}
OTHERS = {
    "titok_vq": {"size": "bl64", **SHAPES, **PATCHES, "codebook_size": 32, "clustering": True, "usage_window": 64},
    "titok_vae": {"size": "bl64", **SHAPES, **PATCHES},
    "kl": {"size": "emoji-kl-f8", "ch": 8, "num_groups": 4, "latent_channels": 3},
    "maskgit_vqgan": {
        "size": "emoji-f8",
        "hidden_channels": 8,
        "z_channels": 8,
        "num_embeddings": 32,
        "num_groups": 4,
        "usage_window": 64,
    },
    "chameleon_vqgan": {
        "size": "emoji-f8",
        "ch": 8,
        "z_channels": 8,
        "n_embed": 32,
        "embed_dim": 4,
        "num_groups": 4,
        "usage_window": 64,
    },
}


CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[3] / "configs").rglob("*.yaml")
    if "\nsystem: tokenizer\n" in path.read_text(encoding="utf-8")
)


@pytest.fixture
def config_of(tmp_path, pictures):
    def make(*overrides):
        content = {
            "version": 1,
            "system": "tokenizer",
            "family": "vq",
            "out": str(tmp_path / "run"),
            "steps": 6,
            "batch_size": 4,
            "log_every": 2,
            "evaluate_every": 3,
            "preview_every": 6,
            "tensorboard": False,
            "data": {"path": str(pictures), "size": 32},
            "model": MODEL,
            "loss": {"disc_start": 4, "disc_width": 4, "disc_layers": 2, "restart_every": 2, "restart_until": 1.0},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


@pytest.fixture
def config_of_other(tmp_path, config_of):
    """The config of another family, with its own model settings."""

    def make(family, *overrides):
        config_of()  # writes the file
        path = tmp_path / "config.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content |= {"family": family, "model": OTHERS[family]}
        content["loss"]["restart_every"] = 0
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


def entries(tmp_path, kind):
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def test_a_run_from_pictures_to_a_model(tmp_path, config_of):
    summary = train(config_of("precision=bf16", "channels_last=true"))
    logged = entries(tmp_path, "train")
    # The discriminator joins at step 4 (from 1): not in the first two steps' figures, in the later ones.
    assert (
        "loss_discriminator" not in logged[0]
        and {"loss_discriminator", "real", "fake", "adversarial"} <= logged[-1].keys()
    )
    assert {"loss", "reconstruction", "perceptual", "vq", "commit", "usage"} <= logged[0].keys()
    held_out = entries(tmp_path, "held_out")[-1]
    assert 0 < held_out["codes_used"] <= 64 and held_out["psnr"] > 3 and held_out["ssim"] <= 1
    model = VQModel.from_pretrained(summary.model)
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    with Image.open(tmp_path / "run" / "previews" / "step_00000006.png") as sheet:
        assert sheet.width > sheet.height  # 4 rows of up to 8
    names = {path.name for path in checkpoints(tmp_path / "run" / "checkpoints")[-1].folder.iterdir()}
    assert {
        "tokenizer.safetensors",
        "tokenizer.average.safetensors",
        "discriminator.safetensors",
        "state.json",
    } <= names
    assert "discriminator.average.safetensors" not in names


def test_resume_in_the_middle_of_the_gan_is_exact(tmp_path, config_of):
    def weights(folder):
        return {key: value.numpy().tobytes() for key, value in VQModel.from_pretrained(folder).state_dict().items()}

    whole = weights(train(config_of(f"out={tmp_path / 'whole'}")).model)
    stopped = train(config_of("time_limit_minutes=1e-9"))
    while not stopped.finished:
        stopped = train(config_of("time_limit_minutes=1e-9"))
    assert weights(stopped.model) == whole


@pytest.mark.parametrize("more", [(), ("optimizer.name=muon", "channels_last=true")], ids=str)
def test_looking_changes_nothing(tmp_path, config_of, more):
    trainer = Trainer(config_of("loss.disc_start=2", *more))
    assert changed_by_looking(trainer, tmp_path / "looks", 2) == []


def test_unused_codes_are_revived_in_weights_and_average(config_of):
    trainer = Trainer(config_of("loss.disc_start=100"))
    system, average = trainer.system, trainer.trainees["tokenizer"].average
    assert list(system.networks) == ["tokenizer"]  # no GAN within the run: no discriminator at all
    trainer.step(0, system.batches(0, 0, 1))
    system.model.quantize.codebook_used.copy_(torch.arange(128) % 8)  # codes 8 and up are dead
    before = system.model.quantize.embedding.weight.detach().clone()
    (message, *_) = system.after_step(1, torch.Generator(), {"tokenizer": average.values})
    assert message == "revived 56 unused codes of 64"
    weight = system.model.quantize.embedding.weight.detach()
    assert torch.equal(weight[:8], before[:8]) and not torch.isclose(weight[8:], before[8:]).all(dim=1).any()
    assert torch.equal(average.values["quantize.embedding.weight"][8:], weight[8:])


def test_collapse_is_said(config_of):
    trainer = Trainer(config_of("loss.restart_every=0"))
    trainer.step(0, trainer.system.batches(0, 0, 1))
    trainer.system.model.quantize.codebook_used.fill_(5)
    (message,) = trainer.system.after_step(1, torch.Generator(), {})
    assert message.startswith("warning: the codebook has collapsed")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path=/nowhere", "/nowhere does not exist"),
        ("data.size=30", "multiple of 8"),
        ("data.size=24", "loss.perceptual=pyramid needs data.size >= 32"),
        ("data.flip=2", "data.flip must lie in"),
        ("family=titok_va", "did you mean 'titok_vae'"),
        ("model.size=emoji-f9", "did you mean 'emoji-f"),
        ("model.size=null", "model.size must be set"),
        ("model.zchannels=8", "unknown key `model.zchannels` (did you mean 'z_channels'?)"),
        ("model.ch=wide", "model.ch must be a whole number"),
        ("model.usage_window=0", "set model.usage_window"),
        ("model.encoder_ch_mult=[1]", "equally many levels"),
        ("loss.perceptual=lpips", "needs the file loss.lpips_vgg"),
        ("loss.perceptual=lpips-convnext", "needs the file loss.lpips_vgg"),
        ("loss.disc=hing", "did you mean 'hinge'"),
        ("loss.discriminator=blur", "multiple of its 32 norm groups"),
        ("discriminator.lr=0", "discriminator.lr must be above 0"),
    ],
)
def test_settings_that_cannot_work(config_of, override, words):
    with pytest.raises(VgenError) as error:
        config_of(override)
    assert words in str(error.value)


def test_decoder_stage_keeps_every_code(tmp_path, config_of):
    first = VQModel.from_pretrained(train(config_of()).model)
    stage = ("start.freeze_codes=true", f"start.model={tmp_path / 'run' / 'model'}", "loss.restart_every=0")
    second = VQModel.from_pretrained(train(config_of(*stage, f"out={tmp_path / 'second'}")).model)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = first.encode(pixels)
    assert torch.equal(codes, second.encode(pixels))
    assert not torch.equal(first.decode(codes), second.decode(codes))
    moved = {name for name, value in first.state_dict().items() if not torch.equal(value, second.state_dict()[name])}
    assert moved and all(name.startswith(("decoder", "post_quant_conv")) or "codebook_used" in name for name in moved)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["start.model=/nowhere"], "start.model: there is no folder /nowhere"),
        (["start.freeze_codes=true"], "start.model, which is not set"),
    ],
)
def test_bad_starts(config_of, overrides, message):
    with pytest.raises(VgenError, match=message):
        config_of(*overrides)


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_trains_through_the_same_system(tmp_path, config_of_other, family):
    summary = train(config_of_other(family, "precision=bf16", "loss.discriminator=blur", "loss.disc_width=32"))
    logged, held_out = entries(tmp_path, "train")[-1], entries(tmp_path, "held_out")[-1]
    assert {"reconstruction", "perceptual", "real_accuracy", "fake_accuracy"} <= logged.keys()
    model = open_tokenizer(summary.model)
    tokens = model.encode(torch.zeros(1, 3, 32, 32))
    if model.spec.vocabulary is None:
        assert {"kl", "kl_nats", "latent_mean", "latent_std"} <= logged.keys()
        assert {"kl_nats", "latent_mean", "latent_std", "latent_active"} <= held_out.keys()
        assert model.config.scale == pytest.approx(1 / held_out["latent_std"], rel=0.5)
    else:
        assert held_out["codes_used"] + held_out["codes_dead"] == 32 and "usage" in logged
    assert model.decode(tokens, grid=model.spec.grid(32, 32)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("family", ["maskgit_vqgan", "chameleon_vqgan"])
def test_codes_that_are_no_unit_vectors_are_revived_as_features(config_of_other, family):
    trainer = Trainer(config_of_other(family, "loss.restart_every=1", "loss.restart_until=1"))
    system = trainer.system
    trainer.step(0, system.batches(0, 0, 1))
    quantizer = system.model.quantize
    quantizer.codebook_used.fill_(3)
    (message, *_) = system.after_step(0, torch.Generator(), {})
    assert message == "revived 31 unused codes of 32"
    features = system.model.features(system.latest).movedim(1, -1).flatten(0, -2)
    distances = torch.cdist(quantizer.embedding.weight[4:], features, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(dim=1).values.max() < 1e-5
    assert not torch.allclose(quantizer.embedding.weight.norm(dim=1), torch.ones(32), atol=0.05)


def test_a_trained_vqgan_serves_titok_as_proxy(config_of_other):
    proxy = Trainer(config_of_other("maskgit_vqgan")).system.model
    half = pixel_half(proxy.state_dict())
    assert "pixel_quantize.embedding.weight" in half and not any("codebook_used" in name for name in half)


@pytest.mark.parametrize("family", ["titok_vq", "titok_vae"])
def test_resume_is_exact_for_transformers_and_noise(tmp_path, config_of_other, family):
    def weights(folder):
        return {key: value.numpy().tobytes() for key, value in open_tokenizer(folder).state_dict().items()}

    whole = weights(train(config_of_other(family, "steps=2", f"out={tmp_path / 'whole'}")).model)
    stopped = train(config_of_other(family, "steps=2", "time_limit_minutes=1e-9"))
    while not stopped.finished:
        stopped = train(config_of_other(family, "steps=2", "time_limit_minutes=1e-9"))
    assert weights(stopped.model) == whole


def test_the_noise_of_a_posterior_differs_from_step_to_step(config_of_other):
    latent = Trainer(config_of_other("kl")).system.latent
    draws = [latent.draws(2, torch.Generator().manual_seed(seed))["noise"] for seed in (0, 1, 0)]
    assert draws[0].shape == (2, 3, 4, 4) and torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_a_collapsed_posterior_is_said(config_of_other):
    trainer = Trainer(config_of_other("titok_vae"))
    trainer.step(0, trainer.system.batches(0, 0, 1))
    trainer.system.latent.latest = torch.tensor(0.3)
    (message,) = trainer.system.after_step(1, torch.Generator(), {})
    assert message.startswith("warning: the posterior has collapsed") and "lower loss.kl_weight" in message


def test_a_discriminator_that_wins_is_said(config_of):
    system = Trainer(config_of("loss.restart_every=0")).system
    for accuracy in (1.0, 0.99):
        system.balance.add({"real_accuracy": torch.tensor(accuracy), "fake_accuracy": torch.tensor(1.0)})
    (message,) = system.balance.look()
    assert "wins outright (right about 99.5% of real and 100.0% of reconstructed patches)" in message
    assert system.balance.look() == []
    system.balance.add({"real_accuracy": torch.tensor(1.0), "fake_accuracy": torch.tensor(0.5)})
    assert system.balance.look() == []


def test_text_aware_tokenizers_train_on_captions(monkeypatch, config_of_other):
    class Captions:
        """Stands in for CLIP: the length of a caption in every number."""

        def captions(self, captions):
            asked.append(list(captions))
            lengths = torch.tensor([float(len(caption)) for caption in captions])
            features = lengths[:, None, None].expand(-1, 3, 7)
            return ClipFeatures(text=-features, pooled=-features[:, 0], final=features).condition()

    asked = []
    monkeypatch.setattr(pictures_module, "_text_encoder", lambda config, device: Captions())
    config = config_of_other("titok_vq", "model.text_tokens=3", "model.text_width=7")
    trainer = Trainer(config)
    trainer.step(0, trainer.system.batches(0, 0, 1))
    assert len(asked[0]) == 4 and all("square number" in caption for caption in asked[0])
    trainer.preview(1)
    assert len(asked) == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_models_of_committed_configs_can_be_made(path):
    config = merge(Config, read_yaml(path))
    with torch.device("meta"):
        model = make_model(config)
    assert math.prod(model.spec.grid(config.data.size, config.data.size)) > 0


def test_the_old_name_of_the_system_still_works(config_of):
    config = config_of("system=vq_tokenizer")
    assert isinstance(Trainer(config).system.model, VQModel)
