"""xAR trains from cached latents, over any entities, and becomes a pipeline."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.pipelines.visual import VisualPipeline
from vgen.train.loop import train
from vgen.train.system import build_system

SMALL = {"entities": "blocks-2", "width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1}
SMALL |= {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture
def config_of(latent_config):
    def make(*overrides, **model):
        content = {
            "system": "xar",
            "steps": 100,
            "log_every": 50,
            "evaluate_every": 100,
            "model": {**SMALL, **model},
            "optimizer": {"lr": 0.003, "warmup_steps": 5},
            "sampling": {
                "guidance_scale": 1.5,
                "guidance_schedule": "step-linear-ends",
                "substeps": 8,
                "solver": "sde",
            },
        }
        return latent_config(content, *overrides)

    return make


def test_it_learns_what_the_captions_say_and_samples_it(config_of):
    summary = train(config_of())
    pipe = VisualPipeline.from_pretrained(summary.model)
    made = pipe(["sign minus", "sign plus"], num_images_per_prompt=2, seed=1)
    assert made.stats.calls == 8 * 4 and made.images[0].size == (8, 8)
    minus, plus = made.tokens[:, :, 0].view(2, -1)
    assert (minus < 0).float().mean() > 0.8 and (plus > 0).float().mean() > 0.8


def test_scales_train_on_what_they_make_of_the_latents(config_of):
    summary = train(config_of("steps=2", "evaluate_every=0", entities="scales"))
    made = VisualPipeline.from_pretrained(summary.model)("sign plus", substeps=3)
    assert made.stats.calls == 9 and made.tokens.shape == (1, 21, 3)


def test_draws_are_reproducible_and_previews_work(config_of):
    config = config_of("steps=2", "preview_every=2", "evaluate_every=0", "condition.kind=class")
    system = build_system(config, torch.device("cpu"))
    first, again = (system.draws(5, 0.5, torch.Generator().manual_seed(4)) for _ in range(2))
    assert first["normal"].shape == (5, 4) and first["noise"].shape == (5, 16, 3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    summary = train(config)
    assert len(list(summary.model.parent.glob("previews/*.png"))) == 1


def test_bad_settings_are_one_sentence(config_of, token_sets):
    with pytest.raises(VgenError, match="cells that divide it"):
        config_of(entities="blocks-3")
    with pytest.raises(VgenError, match=r"model\.size must be one of B, L, H"):
        config_of(size="XL")
    with pytest.raises(VgenError, match="holds codes"):
        config_of(f"data.tokens={token_sets}")
