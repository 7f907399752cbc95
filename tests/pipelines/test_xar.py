"""xAR through the pipeline: solvers, entities, scales, continued pictures, saving."""

import json

import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.models.xar.xar import XARModel
from vgen.pipelines.visual import Sampler, VisualPipeline
from vgen.tokenizers_vis.kl import KLModel

LATENTS = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 3, "num_groups": 4}
SMALL = {"channels": 3, "grid": (4, 4), "width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "classes": 5}


def pipeline(entities="blocks-2", **settings):
    torch.manual_seed(0)
    tokenizer = KLModel(**LATENTS, scale=1.0).eval().requires_grad_(False)
    model = XARModel(entities=entities, **SMALL).eval().requires_grad_(False)
    settings = {"substeps": 3, "solver": "sde", "guidance_scale": 2.0, **settings}
    return VisualPipeline(
        tokenizer, model, order=model.default_order().name, guidance_schedule="step-linear-ends", **settings
    )


@pytest.mark.parametrize("entities, calls", [("blocks-2", 4), ("raster", 16), ("subsample-2", 4), ("scales", 3)])
def test_pictures_of_any_entities(entities, calls, tmp_path):
    pipe = pipeline(entities)
    made = pipe(class_labels=[0, 4], num_images_per_prompt=2, seed=1)
    assert made.images[0].size == (8, 8) and made.stats.calls == 3 * calls
    assert made.tokens.shape == (4, 21 if entities == "scales" else 16, 3)
    pipe.save_pretrained(tmp_path)
    again = VisualPipeline.from_pretrained(tmp_path)
    assert again.config.solver == "sde" and again.model.config.entities == entities
    torch.testing.assert_close(
        again(class_labels=[0, 4], num_images_per_prompt=2, seed=1, batch_size=1).tokens,
        made.tokens,
        atol=1e-4,
        rtol=1e-4,
    )
    assert pipe(class_labels=1, substeps=5).stats.calls == 5 * calls


def test_a_folder_from_before_the_modules_moved_opens(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    today = json.loads(index.read_text())
    index.write_text(json.dumps({**today, "model": ["vgen.models.xar", "XARModel"]}))
    for kind in (VisualPipeline, Sampler):
        again = kind.open(tmp_path)
        assert type(again.model) is XARModel and again.settings == pipe.settings
        for name, weight in pipe.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], weight), name


def test_the_lower_half_may_be_made_anew():
    pipe = pipeline(substeps=4, solver="euler")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 4, 8, 8))
    picture = {"init_image": Image.new("RGB", (8, 8), "red"), "mask": mask}
    made, other = (pipe(class_labels=1, seed=seed, **picture) for seed in (0, 1))
    upper = slice(0, 8)
    assert made.stats.calls == 2 * 4 and torch.equal(made.tokens[:, upper], other.tokens[:, upper])
    mask.paste(255, (0, 0, 1, 1))
    with pytest.raises(VgenError, match="whole entities"):
        pipe(class_labels=1, **picture)


def test_bad_settings_are_one_sentence():
    pipe = pipeline()
    with pytest.raises(VgenError, match="at least 3 substeps"):
        pipe(class_labels=1, substeps=2)
    with pytest.raises(VgenError, match="order blocks-2, got 'raster'"):
        pipe(class_labels=1, order="raster")
    with pytest.raises(VgenError, match="no top-k"):
        pipe(class_labels=1, top_k=5)
    scales = pipeline("scales")
    with pytest.raises(VgenError, match="every scale in one call"):
        scales(class_labels=1, low_steps=2)
    with pytest.raises(VgenError, match="leave out low_substeps"):
        scales(class_labels=1, low_substeps=2)
