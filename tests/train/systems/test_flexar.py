"""FlexAR trains on sequences of FlexTok's kind by words, classes and prompts, and becomes a pipeline."""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from vgen.cli.main import main
from vgen.data.tokens import TokenSetSpec, write_tokens
from vgen.errors import VgenError
from vgen.pipelines.visual import VisualPipeline
from vgen.settings import merge, read_yaml
from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config
from vgen.train.systems.flexar import Config, FlexARSystem

SMALL = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
TOKENIZER = {
    "encoder_width": 16, "encoder_depth": 1, "decoder_width": 16, "decoder_depth": 1, "head_dim": 8, "registers": 8,
    "levels": [8, 4], "max_grid": [4, 4], "frequencies": 8, "steps": 2, "guidance": 1.0,
}  # fmt: skip


@pytest.fixture
def size():
    """Of the pictures that the sequences are of; None: an older set, which does not say it."""
    return None


@pytest.fixture
def config_of(tmp_path, size):
    FlexTok.of_size("emoji-pixels", **TOKENIZER).save_pretrained(tmp_path / "flextok")
    (tmp_path / "sequences").mkdir()
    for split, rows in (("train", 24), ("heldout", 6)):
        kind = torch.arange(rows) % 4
        write_tokens(
            tmp_path / "sequences" / f"{split}.safetensors",
            (kind[:, None] * 8 + torch.arange(8)).int(),
            captions=[f"pattern {['one', 'two', 'three', 'four'][k]}" for k in kind],
            labels=kind.tolist(),
            keys=[f"{split}-{i}" for i in range(rows)],
            grid=(1, 1, 8),
            vocabulary=32,
            tokenizer="none",
            class_names=("a", "b", "c", "d"),
            size=size,
        )

    def make(*overrides, **model):
        content = {
            "version": 1,
            "system": "flexar",
            "out": str(tmp_path / "run"),
            "steps": 60,
            "batch_size": 8,
            "log_every": 30,
            "evaluate_every": 30,
            "preview_every": 0,
            "ema_decay": 0.8,
            "tensorboard": False,
            "data": {"tokens": str(tmp_path / "sequences"), "tokenizer": str(tmp_path / "flextok")},
            "model": {**SMALL, **model},
            "optimizer": {"lr": 0.01, "warmup_steps": 5},
            "sampling": {"guidance_scale": 1.5},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


@pytest.mark.parametrize("kind", ["words", "class"])
def test_it_learns_what_the_condition_says_and_samples_it(config_of, kind):
    summary = train(config_of(f"condition.kind={kind}", "preview_every=60"))
    assert summary.figures["cross_entropy"] < 1.0 and list(summary.folder.glob("previews/*.png"))
    pipe = VisualPipeline.from_pretrained(summary.model)
    asked = {"words": {"prompt": ["pattern one", "pattern three"]}, "class": {"class_labels": [0, 2]}}[kind]
    made = pipe(**asked, seed=1, temperature=0.0)
    assert made.stats.calls == 8 and made.images[0].size == (32, 32)
    one, three = made.tokens // 8
    assert (one == 0).float().mean() > 0.8 and (three == 2).float().mean() > 0.8
    if kind == "words":
        with pytest.raises(VgenError, match="'zebra'"):
            pipe("pattern zebra")


def test_only_the_leading_tokens(config_of):
    summary = train(config_of("steps=2", "evaluate_every=2", "preview_every=2", tokens=3))
    pipe = VisualPipeline.from_pretrained(summary.model)
    made = pipe("pattern one", seed=1)
    assert made.tokens.shape == (1, 3) and made.stats.calls == 3 and made.images[0].size == (32, 32)


@pytest.mark.parametrize("size", [(16, 24)])
def test_it_makes_pictures_of_the_size_it_learned(tmp_path, config_of, size):
    summary = train(config_of("steps=1", "evaluate_every=0", "preview_every=1"))
    (preview,) = summary.folder.glob("previews/*.png")
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert pipe("pattern one").images[0].size == (24, 16), "PIL says width x height"
    assert pipe("pattern one", size=(32, 8)).images[0].size == (8, 32)
    command = ["sample", "--model", str(summary.model), "--prompt", "pattern one", "--out"]
    for more, wide in (([], (24, 16)), (["--size", "32x8"], (8, 32)), (["--size", "8"], (8, 8))):
        assert main([*command, str(tmp_path / "one.png"), *more]) == 0
        assert Image.open(tmp_path / "one.png").size == wide
    assert main([*command, f"{tmp_path / 'many'}/", "--num-images", "2", "--size", "32x8"]) == 0
    assert main([*command, f"{tmp_path / 'many'}/", "--num-images", "2", "--size", "32x8"]) == 0
    assert main([*command, f"{tmp_path / 'many'}/", "--num-images", "2"]) == 2, "other settings"
    with Image.open(preview) as sheet:
        assert sheet.width > sheet.height


def test_prompts_through_a_t5(tmp_path, config_of):
    transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = ["<pad>", "</s>", "<unk>", "pattern", "one", "two", "three", "four"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    options = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(known), **options)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    prompts = ("condition.kind=text", f"condition.text_encoder={tmp_path / 't5'}")
    summary = train(config_of(*prompts, "steps=3", "evaluate_every=3", "preview_every=3", text_width=16))
    assert list(summary.folder.glob("previews/*.png"))
    pipe = VisualPipeline.from_pretrained(summary.model)
    pipe.model.read_words({"text_encoder": Path(tmp_path / "t5")})
    assert pipe(["pattern one"], seed=1).tokens.shape == (1, 8)


def test_stopped_after_every_step_it_reaches_the_same_weights(tmp_path, config_of):
    def weights(folder):
        pipe = VisualPipeline.from_pretrained(folder)
        return {name: value.numpy().tobytes() for name, value in pipe.model.state_dict().items()}

    quick = ("steps=3", "evaluate_every=0")
    whole = weights(train(config_of(f"out={tmp_path / 'whole'}", *quick)).model)
    while not (stopped := train(config_of("time_limit_minutes=1e-9", *quick))).finished:
        pass
    assert weights(stopped.model) == whole


def test_dropped_words_add_nothing_but_the_start(config_of):
    system = Trainer(config_of("condition.dropout=1.0")).system
    condition = system.condition(["pattern one"] * 3, torch.zeros(3), torch.Generator().manual_seed(0))
    assert torch.equal(condition.ids[:, 0], torch.full((3,), system.vocabulary.start))
    assert condition.mask.sum(dim=1).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.size=112M", "did you mean '113M'"),
        ("model.norm=layr", "did you mean 'layer'"),
        ("model.heads=5", "multiple of the 5 heads"),
        ("model.depth=0", "model.depth must be above 0"),
        ("model.tokens=9", "model.tokens must lie in 1..8"),
    ],
)
def test_settings_that_cannot_work(config_of, override, words):
    with pytest.raises(VgenError) as error:
        config_of(override)
    assert words in str(error.value)


def test_a_grid_is_no_sequence(config_of, token_sets):
    with pytest.raises(VgenError, match="learns sequences such as FlexTok's"):
        config_of(f"data.tokens={token_sets}")


@pytest.mark.parametrize("name", ["flexar/c2i_d30", "flexar/t2i_1B", "emoji/flexar"])
def test_models_of_committed_configs_can_be_made(name):
    config = merge(Config, read_yaml(Path(__file__).parents[3] / "configs" / f"{name}.yaml"))
    with torch.device("meta"):
        model = FlexARSystem.make_model(config, TokenSetSpec((1, 1, 256), 64000), 1000)
    blocks = sum(p.numel() for p in model.trunk.parameters())
    assert model.config.conditioning == config.condition.kind
    if name == "flexar/c2i_d30":
        assert blocks == pytest.approx(1.33e9, rel=0.01)
    if name == "flexar/t2i_1B":
        assert blocks == pytest.approx(1.15e9, rel=0.03)
