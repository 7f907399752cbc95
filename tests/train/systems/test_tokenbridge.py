"""TokenBridge trains from cached latents that it quantises, orders channels by frequency, and becomes a pipeline."""

import math

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.mar.tokenbridge import TokenBridgeModel
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.tokenbridge import TokenBridge
from vgen.train.loop import train
from vgen.train.system import build_system

STACKS = {
    f"{stack}_{key}": value
    for stack in ("encoder", "decoder")
    for key, value in (("width", 32), ("layers", 1), ("heads", 2))
}
SMALL = {"buffer": 2, "head_width": 32, "head_layers": 1, "head_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture
def config_of(latent_config):
    def make(*overrides):
        content = {
            "system": "tokenbridge",
            "steps": 80,
            "log_every": 30,
            "evaluate_every": 80,
            "ema_decay": 0.8,
            "model": {**SMALL, **STACKS},
            "quantizer": {"bits": 3},
            "optimizer": {"lr": 0.005, "warmup_steps": 5},
            "sampling": {
                "order": "random:steps=4,schedule=mar",
                "guidance_scale": 1.5,
                "guidance_schedule": "linear-clamped",
            },
        }
        return latent_config(content, *overrides)

    return make


def test_it_learns_what_the_captions_say_and_samples_it(config_of):
    summary = train(config_of())
    assert summary.figures["cross_entropy"] < 0.6 * math.log(8)
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert isinstance(pipe.tokenizer, TokenBridge) and pipe.tokenizer.spec.levels == 8
    assert sorted(pipe.model.config.channel_order) == [0, 1, 2]
    made = pipe(["sign minus", "sign plus"], num_images_per_prompt=4, seed=1)
    assert made.stats.calls == 4 and made.images[0].size == (8, 8) and made.tokens.dtype == torch.int64
    minus, plus = pipe.tokenizer.latents(made.tokens)[:, :, 0].view(2, -1)
    assert (minus < 0).float().mean() > 0.8 and (plus > 0).float().mean() > 0.8


def test_classes_and_previews(config_of):
    summary = train(config_of("steps=2", "preview_every=2", "evaluate_every=0", "condition.kind=class"))
    assert VisualPipeline.from_pretrained(summary.model).model.config.classes == 2
    assert list(summary.model.parent.rglob("*.png"))


def test_orders_of_channels(config_of, latent_sets):
    def order(name):
        return build_system(config_of(f"channel_order={name}"), torch.device("cpu")).model.head.order

    assert order("stored") == (0, 1, 2)
    # The means of channels 1 and 2 are constant, that of channel 0 is constant in a picture: ties keep the stored order.
    assert order("frequency") == (0, 1, 2)
    with pytest.raises(VgenError, match="each of 0 to 2 once"):
        config_of("channel_order=kl16")


def test_a_quantised_tokenizer_must_agree(config_of, tmp_path):
    folder = tmp_path / "quantised"
    TokenBridge.quantize(KLModel.from_pretrained(tmp_path / "tokenizer"), bits=3).save_pretrained(folder)
    system = build_system(config_of(f"data.tokenizer={folder}"), torch.device("cpu"))
    assert isinstance(system.model, TokenBridgeModel) and isinstance(system.tokenizer, TokenBridge)
    assert isinstance(system.tokenizer.tokenizer, KLModel), "it is not quantised twice"
    with pytest.raises(VgenError, match="levels 8, low -5"):
        build_system(config_of(f"data.tokenizer={folder}", "quantizer.bits=4"), torch.device("cpu"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["channel_order=frequence"], "did you mean 'frequency'"),
        (["model.size=XL"], "model.size must be one of B, L, H"),
        (["quantizer.bits=0"], "at least 1 bit"),
        (["quantizer.low=9"], "low < high"),
        (["model.head_heads=5"], "multiple of its 5 heads"),
        (["model.attention_dropout=1.0"], "model.attention_dropout"),
    ],
)
def test_impossible_settings_are_refused(config_of, overrides, message):
    with pytest.raises(VgenError, match=message):
        config_of(*overrides)
