"""MAR trains from cached latents, with any head, and becomes a pipeline."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.pipelines.visual import VisualPipeline
from vgen.train.loop import train
from vgen.train.system import build_system
from vgen.train.systems.mar import MARSystem

STACKS = {
    f"{stack}_{key}": value
    for stack in ("encoder", "decoder")
    for key, value in (("width", 32), ("layers", 1), ("heads", 2))
}
SMALL = {"buffer": 2, "head_width": 32, "head_layers": 2, "dropout": 0.0, "attention_dropout": 0.0, **STACKS}


@pytest.fixture
def config_of(latent_config):
    def make(*overrides, **model):
        content = {
            "system": "mar",
            "steps": 120,
            "log_every": 60,
            "evaluate_every": 60,
            "model": {**SMALL, **model},
            "optimizer": {"lr": 0.003, "warmup_steps": 5},
            "sampling": {
                "order": "random:steps=4,schedule=mar",
                "guidance_scale": 1.5,
                "guidance_schedule": "linear-clamped",
            },
        }
        return latent_config(content, *overrides)

    return make


@pytest.mark.parametrize("head, substeps", [("diffusion", "ddim20"), ("flow", "20")])  # "20" has t = 999: see docs
def test_it_learns_what_the_captions_say_and_samples_it(config_of, head, substeps):
    summary = train(config_of(f"sampling.substeps={substeps}", head=head))
    assert summary.figures["loss"] < 0.9
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert pipe.config.order == "random:steps=4,schedule=mar" and pipe.model.config.head == head
    made = pipe(["sign minus", "sign plus"], num_images_per_prompt=4, seed=1)
    assert made.stats.calls == 4 and made.images[0].size == (8, 8)
    minus, plus = made.tokens[:, :, 0].view(2, -1)
    assert (minus < 0).float().mean() > 0.8 and (plus > 0).float().mean() > 0.8


@pytest.mark.parametrize("head, pictures", [("mean_flow", 1), ("diffusion", 0)])
def test_previews_of_a_fresh_model_stop_nothing(config_of, capsys, head, pictures):
    """The diffusion head starts with latents that no tokenizer decodes."""
    options = ("steps=2", "preview_every=2", "evaluate_every=0", "condition.kind=class", "sampling.substeps=2")
    summary = train(config_of(*options, head=head))
    assert len(list(summary.model.parent.glob("previews/*.png"))) == pictures
    assert ("step 2: no preview (latents must be scaled" in capsys.readouterr().err) == (pictures == 0)
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert pipe.model.config.conditioning == "class" and pipe.model.config.classes == 2


def test_draws_are_one_share_of_masked_tokens_a_batch(config_of):
    system = build_system(config_of(mask_ratio_min=0.5), torch.device("cpu"))
    assert isinstance(system, MARSystem)
    sizes = set()
    for seed in range(20):
        shown = system.draws(6, None, torch.Generator().manual_seed(seed))["shown"]
        assert torch.equal(shown, system.draws(6, 0.5, torch.Generator().manual_seed(seed))["shown"])
        assert len(shown) == 6 and (shown.diff(dim=1) > 0).all()
        sizes.add(shown.shape[1])
    assert len(sizes) > 3 and max(sizes) <= 8


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.head=difusion"], "did you mean 'diffusion'"),
        (["model.size=XL"], "model.size must be one of B, L, H"),
        (["model.dropout=1.0"], "model.dropout"),
        (["model.diffusion_batch=0"], "model.diffusion_batch must be above 0"),
        (["model.decoder_heads=3"], "multiple of the 3 heads"),
        (["model.mask_ratio_min=2.0"], "mask_ratio_min is a share"),
    ],
)
def test_impossible_settings_are_refused(config_of, overrides, message):
    with pytest.raises(VgenError, match=message):
        config_of(*overrides)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["sampling.substeps=abc"], "config: sampling: the substeps of a diffusion"),
        (
            ["sampling.substeps=ddim20", "model.head=flow"],
            "config: sampling: the number of substeps of a flow must be a whole number",
        ),
        (["sampling.top_k=5"], "no top-k or top-p"),
        (["sampling.guidance_scale=0.5"], "at least 1"),
        (["sampling.order=random:steps=17"], "1 to 16 steps, got 17"),
    ],
)
def test_sampling_that_cannot_work_is_refused_before_training(config_of, overrides, message):
    with pytest.raises(VgenError, match=message):
        build_system(config_of(*overrides), torch.device("cpu"))


def test_codes_are_no_latents(config_of, token_sets):
    with pytest.raises(VgenError, match="holds codes, this system trains on latents"):
        config_of(f"data.tokens={token_sets}")
