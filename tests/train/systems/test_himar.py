"""Hi-MAR trains from latents of two sizes and becomes a pipeline that makes a small picture first."""

import pytest
import torch
from PIL import Image

from vgen.data.tokens import TokenDataset, write_tokens
from vgen.errors import VgenError
from vgen.pipelines.visual import VisualPipeline
from vgen.train.loop import train
from vgen.train.system import build_system
from vgen.train.systems.himar import HiMARSystem
from vgen.viz.trace import Trace

SMALL = {
    "width": 32,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "buffer": 2,
    "head_width": 32,
    "head_layers": 1,
    "grid_head_width": 32,
    "grid_head_layers": 1,
    "grid_head_heads": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pivot_rate": 0.5,
}


@pytest.fixture
def config_of(latent_config):
    def make(*overrides):
        content = {
            "system": "himar",
            "steps": 40,
            "log_every": 20,
            "evaluate_every": 40,
            "model": SMALL,
            "optimizer": {"lr": 0.005, "warmup_steps": 5},
            "sampling": {
                "order": "random:steps=3,schedule=mar",
                "guidance_scale": 1.5,
                "low_guidance_scale": 2.0,
                "guidance_schedule": "linear-clamped",
                "substeps": "ddim20",
                "low_substeps": "ddim20",
                "low_steps": 2,
                "clip": 3.0,
            },
        }
        return latent_config(content, *overrides)

    return make


@pytest.fixture
def trained(config_of):
    return train(config_of())


def test_it_learns_and_becomes_a_pipeline_of_two_levels(trained):
    assert trained.figures["loss"] < 0.5  # about 1 at the start
    pipe = VisualPipeline.from_pretrained(trained.model)
    assert pipe.config.order == "random:steps=3,schedule=mar" and pipe.grids == ((1, 2, 2), (1, 4, 4))
    trace = Trace()
    made = pipe(["sign minus", "sign plus"], num_images_per_prompt=4, seed=1, callback_on_step_end=trace)
    assert made.stats.calls == 2 + 3 and made.stats.tokens == 8 * 20 and made.images[0].size == (8, 8)
    for level in (slice(4), slice(4, 20)):  # +-1 in the first channel, 0 in the others, with a deviation of 0.1
        size = made.tokens[:, level].abs().mean(dim=(0, 1))
        assert size[0] > 0.5 and (size[1:] < 0.5).all()
    previews = pipe.decode_tokens(made.tokens, level=0)
    assert len(previews) == 8 and previews[0].size == (4, 4)
    frames = trace.frames(pipe.decode_tokens)  # small pictures are enlarged
    assert len(frames) == 5 and len({frame.size for frame in frames}) == 1

    # settings of the small picture
    assert pipe("sign minus", low_steps=4, num_inference_steps=2).stats.calls == 6
    free = pipe("sign minus", guidance_scale=1.0, seed=1).tokens
    both = pipe("sign minus", guidance_scale=1.0, low_guidance_scale=1.0, seed=1)
    assert both.stats.call_rows == 5 and not torch.equal(free[:, :4], both.tokens[:, :4])
    default = pipe("sign minus", seed=1).tokens
    assert torch.equal(free[:, :4], default[:, :4]) and not torch.equal(free, default)
    assert not torch.equal(default, pipe("sign minus", low_substeps="ddim10", seed=1).tokens)
    with pytest.raises(VgenError, match="4 tokens can be decoded in 1 to 4 steps, got 5"):
        pipe("sign minus", low_steps=5)

    # inpainting: both levels keep what the mask does not touch
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (4, 0, 8, 8))
    kept = pipe("sign plus", init_image=made.images[0], mask=mask, seed=2, num_images_per_prompt=2).tokens
    known = [row * 2 for row in range(2)] + [4 + row * 4 + column for row in range(4) for column in range(2)]
    assert torch.equal(kept[0, known], kept[1, known]) and not torch.equal(kept[0], kept[1])


def test_fresh_models_train_with_classes(config_of):
    summary = train(config_of("steps=2", "evaluate_every=0", "condition.kind=class"))
    pipe = VisualPipeline.from_pretrained(summary.model)
    assert pipe.model.config.conditioning == "class" and pipe.model.config.classes == 2


def test_draws_of_both_phases(config_of):
    system = build_system(config_of("model.mask_ratio_min=0.5", "pivot_warmup=0.5"), torch.device("cpu"))
    assert isinstance(system, HiMARSystem)
    shares, steered = set(), {0.0: 0, 0.25: 0, None: 0}
    for seed in range(40):
        for progress in steered:
            draws = system.draws(6, progress, torch.Generator().manual_seed(seed))
            steered[progress] += int(draws["steered"].sum())
            assert (draws["drops"] == 1).all() == (progress is None)
        assert draws["low_shown"].shape[1] <= 2
        shares.add(draws["shown"].shape[1])
    assert len(shares) > 8 and min(shares) == 0
    assert steered[0.0] == 0 and steered[0.25] < steered[None] < 240
    batch = next(system.batches(0, 0, 1))
    assert system.inputs(batch)["low"].shape == (8, 4, 3)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.size=XL"], "model.size must be one of B, L, H"),
        (["model.dense_masks=linear"], "model.dense_masks must be one of cosine, normal"),
        (["model.pivot_rate=2"], "model.pivot_rate must lie in"),
        (["pivot_warmup=-1"], "pivot_warmup must lie in"),
        (["model.diffusion_batch=0"], "model.diffusion_batch must be above 0"),
        (["model.grid_head_heads=3"], "multiple of 4 and of its 3 heads"),
    ],
)
def test_impossible_settings_are_refused(config_of, overrides, message):
    with pytest.raises(VgenError, match=message):
        config_of(*overrides)


def test_latents_of_one_size_do_not_do(config_of, latent_sets):
    path = latent_sets / "train.safetensors"
    data = TokenDataset(path)
    names = {name: getattr(data, name) for name in ("captions", "labels", "keys", "class_names", "tokenizer", "grid")}
    write_tokens(path, data.tokens, vocabulary=None, **names)
    with pytest.raises(VgenError, match="no latents of smaller pictures"):
        config_of()


def test_settings_of_a_small_picture_need_one(pipeline):
    for settings in ({"low_steps": 2}, {"low_guidance_scale": 2.0}, {"low_substeps": "ddim5"}):
        with pytest.raises(VgenError, match="make a small picture first"):
            pipeline("red apple", **settings)
