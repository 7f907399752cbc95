"""Every generator family trains from cached tokens, by captions and by classes, resumes exactly, and becomes a pipeline."""

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train.neutral import changed_by_looking

from vgen.data.tokens import TokenDataset
from vgen.errors import VgenError
from vgen.pipelines.visual import VisualPipeline
from vgen.train.checkpoint import checkpoints
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config

LLAMA = {"width": 32, "depth": 2, "heads": 2, "hidden": 64, "token_dropout": 0.0}
ADALN = {"width": 32, "layers": 2, "heads": 2, "hidden": 64, "dropout": 0.0, "attention_dropout": 0.0}
MODELS = {
    "llamagen": LLAMA,
    "par": {**LLAMA, "parallel": 4},
    "nar": {**LLAMA, "depth": 1},
    "dar": ADALN,
    "rar": ADALN,
}


@pytest.fixture
def config_of(tmp_path, token_sets, tokenizer):
    def make(system, *overrides):
        content = {
            "version": 1,
            "system": system,
            "out": str(tmp_path / system),
            "steps": 30,
            "batch_size": 8,
            "log_every": 10,
            "evaluate_every": 15,
            "preview_every": 0,
            "ema_decay": 0.8,
            "tensorboard": False,
            "data": {"tokens": str(token_sets), "tokenizer": str(tmp_path / "tokenizer")},
            "model": MODELS[system],
            "optimizer": {"lr": 0.01, "warmup_steps": 5},
            "sampling": {"guidance_scale": 1.5},
        }
        path = tmp_path / f"{system}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


@pytest.mark.parametrize("system", MODELS)
def test_it_learns_what_the_captions_say_and_samples_it(config_of, system):
    summary = train(config_of(system, "steps=60", "preview_every=60"))
    # 32 codes: ln 32 = 3.47 nats without the caption and the pattern, 0 with both.
    assert summary.figures["cross_entropy"] < 2.5
    assert (summary.folder / "previews" / "step_00000060.png").is_file()
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert pipe.config.order == pipe.model.default_order().name and pipe.config.guidance_scale == 1.5
    assert "pattern" in pipe.model.vocabulary.words
    one, two = (pipe(f"pattern {word}", seed=1, temperature=0.0) for word in ("one", "three"))
    assert one.images[0].size == (32, 32)
    # Pattern k has the codes 8k … 8k + 7.
    assert (one.tokens // 8 == 0).float().mean() > 0.8 and (two.tokens // 8 == 2).float().mean() > 0.8
    with pytest.raises(VgenError, match="'zebra'"):
        pipe("pattern zebra")


@pytest.mark.parametrize("system", MODELS)
def test_by_classes(config_of, system):
    summary = train(config_of(system, "steps=40", "condition.kind=class"))
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert pipe.model.vocabulary.class_names == ("a", "b", "c", "d")
    made = pipe(class_labels=[0, "d"], seed=1, temperature=0.0).tokens // 8
    assert (made[0] == 0).float().mean() > 0.8 and (made[1] == 3).float().mean() > 0.8
    with pytest.raises(VgenError, match="0 to 3, got 4"):
        pipe(class_labels=4)


@pytest.mark.parametrize("system", ["llamagen", "rar"])
def test_looking_changes_nothing(tmp_path, config_of, system):
    trainer = Trainer(config_of(system, "optimizer.name=muon"))
    assert changed_by_looking(trainer, tmp_path / "looks", 1) == []


def test_stopped_after_every_step_rar_reaches_the_same_weights(tmp_path, config_of):
    """RAR: its draws depend on how far the training is."""
    steps = ("steps=8", "evaluate_every=0", "model.dropout=0.1")
    train(config_of("rar", f"out={tmp_path / 'whole'}", *steps))
    while not train(config_of("rar", "time_limit_minutes=1e-9", *steps)).finished:
        pass
    whole, stopped = (checkpoints(tmp_path / name / "checkpoints")[-1].folder for name in ("whole", "rar"))
    for name in ("model.safetensors", "model.average.safetensors"):
        a, b = load_file(whole / name), load_file(stopped / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_continues_on_the_same_tokens_only(tmp_path, config_of, token_sets):
    """Of other pictures with the same captions, as `vgen tokenize` makes them after a picture was painted over: the sidecar is the same."""
    train(config_of("llamagen", "time_limit_minutes=1e-9", "evaluate_every=0"))
    path = token_sets / "train.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["tokens"][3, 2] += 1
    save_file(tensors, path, metadata)
    assert TokenDataset(path).sidecar_sha256 == metadata["sidecar_sha256"]
    with pytest.raises(
        VgenError, match=r"first 1 steps on other data: \S+tokens/train\.safetensors changed since then"
    ):
        train(config_of("llamagen", "evaluate_every=0"))
    path.write_bytes(whole)
    assert train(config_of("llamagen", "time_limit_minutes=1e-9", "evaluate_every=0")).steps == 2


def test_rar_orders_anneal_to_raster(config_of):
    system = Trainer(config_of("rar", "annealing.start=0.5", "annealing.end=0.75")).system
    generator = torch.Generator().manual_seed(0)

    def random_share(progress):
        orders = system.draws(200, progress, generator)["orders"]
        assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(200, -1))
        return (orders != torch.arange(16)).any(dim=1).float().mean().item()

    assert random_share(0.4) == 1 and random_share(0.8) == 0 and random_share(None) == 0
    assert 0.3 < random_share(0.625) < 0.7


def test_dar_embeds_by_the_tokenizers_normalised_codebook(config_of, tokenizer):
    model = Trainer(config_of("dar")).system.model
    assert torch.equal(model.codebook, tokenizer.quantize.codebook())
    assert not any(name == "codebook" for name, _ in model.named_parameters())


def test_a_token_set_named_val_is_measured_and_the_same_run_continues_when_it_is_named(config_of, token_sets):
    for suffix in ("safetensors", "json"):
        (token_sets / f"heldout.{suffix}").rename(token_sets / f"val.{suffix}")
    assert Trainer(config_of("llamagen")).system.held_out.path == token_sets / "val.safetensors"
    with pytest.raises(VgenError, match=r"test\.safetensors does not exist"):
        config_of("llamagen", "data.held_out_split=test")
    few = ("steps=2", "evaluate_every=0", "log_every=1")
    train(config_of("llamagen", *few))
    named = train(config_of("llamagen", *few, "data.held_out_split=val"))
    assert named.model.is_dir()
    (token_sets / "val.safetensors").unlink()
    with pytest.raises(VgenError, match=r"heldout\.safetensors does not exist"):
        config_of("llamagen")


def test_conditions_are_dropped_by_the_share(config_of):
    system = Trainer(config_of("llamagen", "condition.dropout=0.25")).system
    condition = system.condition(
        ["pattern one"] * 400, torch.zeros(400, dtype=torch.long), torch.Generator().manual_seed(0)
    )
    dropped = (condition.mask.sum(dim=1) == 1) & (condition.ids[:, 0] == system.vocabulary.start)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.06)
    null = system.model.null(condition)
    assert torch.equal(null.ids, torch.full((400, 1), system.vocabulary.start))


@pytest.mark.parametrize(
    ("system", "override", "words"),
    [
        ("llamagen", "data.tokens=/nowhere", "/nowhere/train.safetensors does not exist; make it with `vgen tokenize"),
        ("llamagen", "model.size=XLL", "did you mean 'XL"),
        ("llamagen", "model.depht=3", "did you mean 'depth'"),
        ("llamagen", "condition.kind=words2", "did you mean 'words'"),
        ("llamagen", "condition.dropout=2", "condition.dropout must lie in [0, 1]"),
        ("llamagen", "model.token_dropout=1", "model.token_dropout must lie in [0, 1)"),
        ("par", "model.parallel=9", "multiples of 3, got 4x4"),
        ("par", "model.parallel=5", "square number"),
        ("par", "model.size=XL", "such as XL-4x"),
        ("par", "condition.kind=text", "condition.kind must be one of words, class"),
        ("dar", "data.tokenizer=null", "data.tokenizer must name the tokenizer"),
        ("dar", "model.heads=8", "4D-RoPE"),
        ("rar", "annealing.end=0.2", "must start and end within 0..1 in this order"),
        ("rar", "model.heads=5", "multiple of the 5 heads"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(config_of, system, override, words):
    with pytest.raises(VgenError) as error:
        config_of(system, override)
    assert words in str(error.value)
