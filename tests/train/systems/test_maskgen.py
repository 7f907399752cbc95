"""MaskGen trains on captions through a real, tiny CLIP, on codes and on latents, and becomes a pipeline."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from vgen.data.caching import cache_tokens
from vgen.data.dataset import open_images
from vgen.data.tokens import TokenDataset, TokenSetSpec
from vgen.errors import VgenError
from vgen.pipelines.visual import VisualPipeline
from vgen.settings import merge, read_yaml
from vgen.tokenizers_vis.kl import KLModel
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config
from vgen.train.systems.maskgen import KINDS as SYSTEM_KINDS
from vgen.train.systems.maskgen import Config

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")
SMALL = {"width": 32, "layers": 2, "heads": 2, "text_width": 16, "micro_width": 8}
KINDS = {
    "vq": {"spare_rows": 0, "label_smoothing": 0.0},
    "kl": {"head_width": 32, "head_layers": 2},
}


@pytest.fixture
def clip(tmp_path):
    """A CLIP text tower of width 16 that reads letters, saved as transformers does."""
    folder, letters = tmp_path / "clip", "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture
def config_of(tmp_path, clip, token_sets, tokenizer, latent_sets):
    kl = KLModel(ch=8, ch_mult=(1, 1), num_res_blocks=1, latent_channels=3, num_groups=4, scale=1.0)
    kl.save_pretrained(tmp_path / "kl_tokenizer")

    def make(kind, *overrides, **model):
        data = {
            "vq": {"tokens": str(token_sets), "tokenizer": str(tmp_path / "tokenizer")},
            "kl": {"tokens": str(latent_sets), "tokenizer": str(tmp_path / "kl_tokenizer")},
        }
        content = {
            "version": 1,
            "system": "maskgen",
            "out": str(tmp_path / "run"),
            "steps": 4,
            "batch_size": 8,
            "log_every": 2,
            "evaluate_every": 4,
            "preview_every": 0,
            "ema_decay": 0.8,
            "tensorboard": False,
            "data": data[kind],
            "condition": {"text_encoder": str(clip)},
            "model": {"kind": kind, **SMALL, **KINDS[kind], **model},
            "optimizer": {"lr": 0.01, "warmup_steps": 5},
            "sampling": {"guidance_scale": 1.5},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


def test_codes_are_learned_from_captions(config_of, clip):
    summary = train(config_of("vq", "steps=70", "evaluate_every=70", "sampling.order=confidence-4"))
    assert summary.figures["cross_entropy"] < 2.5  # 3.47 nats without any knowledge
    pipe = VisualPipeline.from_pretrained(summary.model)
    with pytest.raises(VgenError, match="read_words"):
        pipe("pattern one")
    pipe.model.read_words({"text_encoder": Path(clip)})
    made = pipe(["pattern one", "pattern three"], seed=1, temperature=0.0)
    assert made.stats.calls == 4 and made.stats.call_rows == 16
    # Pattern k has the codes 8k … 8k + 7.
    one, three = made.tokens // 8
    assert (one == 0).float().mean() > 0.8 and (three == 2).float().mean() > 0.8


def test_latents_are_learned_from_captions(config_of, clip):
    config = config_of("kl", "steps=80", "evaluate_every=0", "optimizer.lr=0.005", "sampling.substeps=ddim20")
    summary = train(config)
    pipe = VisualPipeline.from_pretrained(summary.model)
    pipe.model.read_words({"text_encoder": Path(clip)})
    made = pipe(["sign minus", "sign plus"], num_images_per_prompt=2, seed=1, num_inference_steps=4)
    minus, plus = made.tokens[:, :, 0].view(2, -1)
    assert (minus < 0).float().mean() > 0.8 and (plus > 0).float().mean() > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_every_step_it_reaches_the_same_weights(tmp_path, config_of, kind):
    quick = ("steps=3", "evaluate_every=0")

    def weights(folder):
        pipe = VisualPipeline.from_pretrained(folder)
        return {name: value.numpy().tobytes() for name, value in pipe.model.state_dict().items()}

    whole = weights(train(config_of(kind, f"out={tmp_path / 'whole'}", *quick)).model)
    while not (stopped := train(config_of(kind, "time_limit_minutes=1e-9", *quick))).finished:
        pass
    assert weights(stopped.model) == whole


def test_a_second_stage_starts_from_the_first(tmp_path, config_of):
    first = train(config_of("vq", "steps=2", "evaluate_every=0")).model / "model"
    system = Trainer(config_of("vq", f"start={first}", f"out={tmp_path / 'second'}")).system
    trained = VisualPipeline.from_pretrained(first.parent).model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in system.model.state_dict().items())
    with pytest.raises(VgenError, match="does not fit MaskGenVQModel"):
        Trainer(config_of("vq", f"start={first}", f"out={tmp_path / 'other'}", width=64))


def test_some_captions_become_empty(config_of):
    system = Trainer(config_of("vq", "condition.dropout=0.5")).system
    condition = system.condition(["pattern one"] * 64, torch.zeros(64), torch.Generator().manual_seed(0))
    empty = (condition.extras["text"] == system.vocabulary.null(64).extras["text"]).all(dim=2).all(dim=1)
    assert 0.3 < empty.float().mean() < 0.7


def test_aesthetic_scores_of_the_data_reach_the_model(tmp_path, config_of, pictures, tokenizer):
    (pictures / "train" / "red" / "0.json").write_text(json.dumps({"aesthetic_score": 7.5}))
    scores = open_images(pictures, "train", 32).aesthetics
    assert [score for score in scores if score == score] == [7.5]
    cache_tokens(tmp_path / "tokenizer", pictures, tmp_path / "scored", size=32, say=str)
    cached = TokenDataset(tmp_path / "scored" / "train.safetensors")
    assert cached[scores.index(7.5)]["aesthetic"] == 7.5 and cached[0]["aesthetic"].isnan()
    assert "aesthetic" not in TokenDataset(tmp_path / "scored" / "heldout.safetensors")[0]
    system = Trainer(config_of("vq", f"data.tokens={tmp_path / 'scored'}", "model.aesthetic=5.5")).system
    seen = []
    system.model.context = lambda condition, context=system.model.context: (seen.append(condition), context(condition))[
        1
    ]
    next(system.losses(next(system.batches(0, 0, 1)), 0, torch.Generator()))
    assert set(seen[0].extras["aesthetic"].tolist()) <= {5.5, 7.5}
    train(config_of("vq", f"data.tokens={tmp_path / 'scored'}", "steps=2", "preview_every=2"))


@pytest.mark.parametrize(
    ("kind", "override", "words"),
    [
        ("vq", "model.kind=vae", "model.kind must be one of vq, kl"),
        ("vq", "model.size=XXL", "did you mean 'XL'"),
        ("vq", "model.mask_schedule=arcos", "did you mean 'arccos'"),
        ("vq", "model.head_width=8", "of model.kind=kl alone"),
        ("kl", "model.label_smoothing=0.1", "of model.kind=vq alone"),
        ("kl", "model.head_layers=0", "head_layers must be above 0"),
        ("vq", "model.label_smoothing=1", "label_smoothing must lie in [0, 1)"),
        ("vq", "model.heads=5", "multiple of the 5 heads"),
        ("vq", "start=/nowhere", "start: there is no folder /nowhere"),
        ("vq", "condition.kind=words", "condition.kind must be one of text"),
    ],
)
def test_settings_that_cannot_work(config_of, kind, override, words):
    with pytest.raises(VgenError) as error:
        config_of(kind, override)
    assert words in str(error.value)


def test_codes_and_latents_are_not_mixed_up(config_of, latent_sets):
    with pytest.raises(VgenError, match="holds latents, this system trains on codes"):
        config_of("vq", f"data.tokens={latent_sets}")


def test_a_tower_that_is_not_there_or_has_another_width_is_found(tmp_path, config_of):
    with pytest.raises(VgenError, match=r"condition\.text_encoder: .*nowhere cannot be loaded"):
        Trainer(config_of("vq", f"condition.text_encoder={tmp_path / 'nowhere'}"))
    with pytest.raises(VgenError, match="takes CLIP features"):
        Trainer(config_of("vq", text_width=12))


@pytest.mark.parametrize(("path", "parameters"), [("vq_L", 604_311_552), ("kl_L", 641_364_000)])
@pytest.mark.parametrize("stage", [1, 2])
def test_recipes_make_the_published_models(path, parameters, stage):
    file = Path(__file__).parents[3] / "configs" / "maskgen" / f"{path}_stage{stage}.yaml"
    config = merge(Config, read_yaml(file))
    spec = {"vq": TokenSetSpec((1, 1, 128), 8192), "kl": TokenSetSpec((1, 1, 32), None, 16)}[config.model.kind]
    with torch.device("meta"):
        model = SYSTEM_KINDS[config.model.kind].make_model(config, spec, 0)
    assert sum(p.numel() for p in model.parameters()) == parameters
