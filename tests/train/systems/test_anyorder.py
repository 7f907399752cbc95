import pytest
import torch
import yaml
from safetensors.torch import load_file

from vgen.data.tokens import TokenDataset, write_tokens
from vgen.errors import VgenError
from vgen.models.anyorder import AnyOrderModel
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.vq import VQModel
from vgen.train.checkpoint import checkpoints
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config


@pytest.fixture
def config_of(tmp_path, token_sets):
    def make(*overrides):
        content = {
            "version": 1,
            "system": "anyorder",
            "out": str(tmp_path / "run"),
            "steps": 30,
            "batch_size": 8,
            "log_every": 10,
            "evaluate_every": 15,
            "preview_every": 30,
            "ema_decay": 0.8,
            "tensorboard": False,
            "data": {"tokens": str(token_sets)},
            "model": {"width": 32, "heads": 1, "content_layers": 1, "query_layers": 1, "dropout": 0.1},
            "orders": {"named": ["raster", "diagonal"], "steps": [4, 16]},
            "optimizer": {"lr": 0.01, "warmup_steps": 5},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


def test_it_learns_what_the_captions_say(config_of):
    summary = train(config_of())
    # 32 codes: ln 32 = 3.47 nats without the caption and the pattern, 0 with both.
    assert summary.figures["cross_entropy"] < 2.5
    model = AnyOrderModel.from_pretrained(summary.model)
    assert "pattern" in model.vocabulary.words and model.grid == (1, 4, 4)


def test_stopped_after_every_step_it_reaches_the_same_weights(tmp_path, config_of):
    steps = ("steps=5", "evaluate_every=0")
    train(config_of(f"out={tmp_path / 'whole'}", *steps))
    while not train(config_of("time_limit_minutes=1e-9", *steps)).finished:
        pass
    whole, stopped = (checkpoints(tmp_path / name / "checkpoints")[-1].folder for name in ("whole", "run"))
    for name in ("model.safetensors", "model.average.safetensors"):
        a, b = load_file(whole / name), load_file(stopped / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_conditions_follow_the_shares(config_of):
    draws = torch.Generator().manual_seed(0)
    captions, labels = ["pattern one"] * 400, torch.full((400,), 2)
    system = Trainer(config_of("condition.dropout=0.25", "condition.class_share=0.5")).system
    vocabulary = system.vocabulary
    condition = system.condition(captions, labels, draws)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(condition.ids, condition.mask)]
    null, label = (vocabulary.start,), (vocabulary.class_id(2), vocabulary.start)
    caption = (*vocabulary.encode("pattern one"), vocabulary.start)
    shares = [rows.count(kind) / 400 for kind in (null, label, caption)]
    assert sum(shares) == 1
    assert shares == pytest.approx([0.25, 0.375, 0.375], abs=0.08)


def test_with_a_tokenizer_it_previews_and_exports_a_pipeline(tmp_path, config_of, tokenizer, capsys):
    summary = train(
        config_of(
            "steps=3", "preview_every=3", f"data.tokenizer={tmp_path / 'tokenizer'}", "sampling.guidance_scale=1.5"
        )
    )
    assert (tmp_path / "run" / "previews" / "step_00000003.png").is_file()
    assert "it/s" not in capsys.readouterr().err, "a bar of the preview's own between the lines of the log"
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert pipe.config.guidance_scale == 1.5
    assert pipe("pattern two", seed=1).images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.tokens=/nowhere", "/nowhere/train.safetensors does not exist; make it with `vgen tokenize"),
        ("data.tokenizer=/nowhere", "/nowhere"),
        ("model.size=XXXL", "unknown model size 'XXXL'"),
        ("model.heads=3", "head size"),
        ("orders.named=[rastr]", "did you mean 'raster'"),
        ("orders.random_share=2", "orders.random_share must lie in [0, 1]"),
        ("condition.dropout=-1", "condition.dropout"),
    ],
)
def test_settings_that_cannot_work(config_of, override, words):
    with pytest.raises(VgenError) as error:
        config_of(override)
    assert words in str(error.value)


def test_foreign_tokenizer_is_refused(tmp_path, config_of, token_sets):
    VQModel.of_size("emoji-f8", ch=8, z_channels=8, num_groups=4).save_pretrained(tmp_path / "tokenizer")
    for split in ("train", "heldout"):
        old = TokenDataset(token_sets / f"{split}.safetensors")
        assert old.tokenizer_sha256 == ""
        write_tokens(
            token_sets / f"{split}.safetensors",
            old.tokens[:, 0],
            captions=old.captions,
            labels=old.labels,
            keys=old.keys,
            grid=old.grid,
            vocabulary=old.vocabulary,
            tokenizer="other",
            tokenizer_sha256="0" * 64,
        )
    with pytest.raises(VgenError, match="made with another tokenizer"):
        train(config_of(f"data.tokenizer={tmp_path / 'tokenizer'}"))
