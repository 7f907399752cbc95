"""MAR through the pipeline: heads and their settings, packed latents, inpainting, saving."""

import json

import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.models.mar.mar import MARModel
from vgen.pipelines.components import Component
from vgen.pipelines.inpainting import Painting
from vgen.pipelines.visual import Sampler, VisualPipeline
from vgen.tokenizers_vis.kl import KLModel

STACKS = {
    f"{stack}_{key}": value
    for stack in ("encoder", "decoder")
    for key, value in (("width", 16), ("layers", 1), ("heads", 2))
}
SMALL = {"grid": (4, 4), "buffer": 2, "classes": 5, "head_width": 16, "head_layers": 1, **STACKS}
LATENTS = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 3, "num_groups": 4}


def pipeline(head="diffusion", packing=1, channels=3, **settings):
    torch.manual_seed(0)
    tokenizer = KLModel(**LATENTS, scale=1.0, packing=packing).eval().requires_grad_(False)
    model = MARModel(channels=channels, head=head, **SMALL).eval().requires_grad_(False)
    return VisualPipeline(tokenizer, model, guidance_schedule="linear-clamped", guidance_scale=2.0, **settings)


def test_a_folder_from_before_the_class_was_renamed_opens(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    for file, change in (
        ("model_index.json", {"model": ["vgen.models.mar", "MAR"]}),
        ("model/config.json", {"_class_name": "MAR"}),
    ):
        today = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({**today, **change}))
    opened = [
        VisualPipeline.open(tmp_path).model,
        Sampler.open(tmp_path).model,
        Component.from_pretrained(tmp_path / "model"),
    ]
    for model in opened:
        assert type(model) is MARModel
        for name, weight in pipe.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("head, substeps", [("diffusion", "ddim2"), ("flow", 3), ("mean_flow", 1)])
def test_any_head_makes_pictures(head, substeps, tmp_path):
    pipe = pipeline(head, order="random:steps=4,schedule=mar", substeps=substeps)
    made = pipe(class_labels=[0, 4], num_images_per_prompt=2, seed=1)
    assert made.images[0].size == (8, 8) and made.tokens.shape == (4, 16, 3) and made.stats.calls == 4
    assert not torch.equal(made.tokens, pipe(class_labels=[0, 4], num_images_per_prompt=2, seed=2).tokens)
    pipe.save_pretrained(tmp_path)
    again = VisualPipeline.from_pretrained(tmp_path)
    assert again.config.substeps == substeps and again.model.config.head == head
    torch.testing.assert_close(
        again(class_labels=[0, 4], num_images_per_prompt=2, seed=1, batch_size=1).tokens,
        made.tokens,
        atol=1e-4,
        rtol=1e-4,
    )


def test_packed_latents_are_the_tokenizers_matter():
    pipe = pipeline(packing=2, channels=12, substeps="ddim2")
    made = pipe(class_labels=1, num_inference_steps=2, order="random")
    assert made.images[0].size == (16, 16) and made.tokens.shape == (1, 16, 12)
    with pytest.raises(VgenError, match="12 channels, the generator was made for 3"):
        pipeline(packing=2)


def test_areas_may_be_made_anew():
    pipe = pipeline(substeps="ddim2")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    made = pipe(
        class_labels=1, init_image=Image.new("RGB", (8, 8), "red"), mask=mask, order="random", num_inference_steps=3
    )
    kept = made.tokens.view(4, 4, 3)[:, 2:]
    assert made.stats.calls == 3 and torch.equal(kept, pipe(
        class_labels=1, init_image=Image.new("RGB", (8, 8), "red"), mask=mask, order="raster", seed=5
    ).tokens.view(4, 4, 3)[:, 2:])  # fmt: skip


def test_latents_of_a_half_precision_tokenizer_enter_the_canvas():
    pipe, kept = pipeline(substeps="ddim2"), torch.ones(4, 4, dtype=torch.bool)
    known = Painting(torch.full((16, 3), 0.5, dtype=torch.bfloat16), kept.flatten(), torch.zeros(3, 8, 8), kept)
    canvas = pipe._canvas(torch.arange(2), known)
    assert canvas.values.dtype == torch.float32 and (canvas.values == 0.5).all() and canvas.known.all()


def test_settings_of_other_kinds_are_refused():
    with pytest.raises(VgenError, match="1 to 16 steps, got 17"):
        pipeline()(class_labels=1, num_inference_steps=17, order="random")
    with pytest.raises(VgenError, match="at least 1"):
        pipeline()(class_labels=1, guidance_scale=0.5)
    with pytest.raises(VgenError, match="no top-k"):
        pipeline()(class_labels=1, top_k=3)
    with pytest.raises(VgenError, match="substeps of a diffusion"):
        pipeline(substeps="many")(class_labels=1)
