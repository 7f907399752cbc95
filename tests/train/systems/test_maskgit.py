"""MaskGIT trains from cached tokens, either network, and becomes a pipeline that samples by confidence."""

import pytest
import torch
import yaml

from vgen.errors import VgenError
from vgen.pipelines.visual import VisualPipeline
from vgen.train.loop import train
from vgen.train.system import load_config

SMALL = {"width": 32, "layers": 2, "heads": 2, "hidden": 64}
PLAIN = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture
def config_of(tmp_path, token_sets, tokenizer):
    def make(*overrides, **model):
        content = {
            "version": 1,
            "system": "maskgit",
            "out": str(tmp_path / "maskgit"),
            "steps": 70,
            "batch_size": 8,
            "log_every": 35,
            "evaluate_every": 35,
            "preview_every": 0,
            "ema_decay": 0.8,
            "tensorboard": False,
            "data": {"tokens": str(token_sets), "tokenizer": str(tmp_path / "tokenizer")},
            "model": {**SMALL, **model},
            "optimizer": {"lr": 0.01, "warmup_steps": 5},
            "sampling": {"guidance_scale": 1.5, "order": "confidence-4", "choice": "maskgit", "temperature": 0.5},
        }
        path = tmp_path / "maskgit.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path, overrides)

    return make


def test_it_learns_what_the_captions_say_and_samples_it(config_of):
    summary = train(config_of(size="L-32", **PLAIN))
    # Label smoothing 0.1 over 32 codes leaves at least 0.66 nats.
    assert summary.figures["cross_entropy"] < 2.5
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert pipe.config.order == "confidence-4" and pipe.config.choice == "maskgit"
    made = pipe(["pattern one", "pattern three"], seed=1, guidance_scale=2.0)
    assert made.stats.calls == 4 and made.images[0].size == (32, 32)
    # Pattern k has the codes 8k … 8k + 7.
    one, three = made.tokens // 8
    assert (one == 0).float().mean() > 0.8 and (three == 2).float().mean() > 0.8
    assert pipe("pattern one", seed=1, num_inference_steps=7).stats.calls == 7
    with pytest.raises(VgenError, match="'zebra'"):
        pipe("pattern zebra")


def test_the_other_network_by_classes(config_of):
    config = config_of("steps=4", "evaluate_every=0", "condition.kind=class", size="S-128")
    pipe = VisualPipeline.from_pretrained(train(config).model)
    assert type(pipe.model).__name__ == "MaskGITUViTModel"
    result = pipe(class_labels=[0, 3], seed=1, order="random", num_inference_steps=3)
    assert result.tokens.shape == (2, 16) and result.stats.calls == 3
    with pytest.raises(VgenError, match="0 to 3, got 4"):
        pipe(class_labels=4)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"size": "L-33"}, "did you mean 'L-32'"),
        ({"mask_schedule": "arcos"}, "did you mean 'arccos'"),
        ({"size": "S-128", "dropout": 0.1}, "has no dropout"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"heads": 3}, "multiple of the 3 heads"),
    ],
)
def test_bad_settings_are_found_before_anything_is_loaded(config_of, model, message):
    with pytest.raises(VgenError, match=message):
        config_of(**model)


def test_draws_are_of_the_step_alone(config_of):
    from vgen.train.systems.maskgit import build

    system = build(config_of(**PLAIN), torch.device("cpu"))
    one, again = (system.draws(3, 0.5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one["permutation"], again["permutation"]) and torch.equal(one["uniform"], again["uniform"])
    assert torch.equal(one["permutation"].sort(dim=1).values, torch.arange(16).expand(3, -1))
