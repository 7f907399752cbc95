"""The caption task: a model that knows its pictures scores full marks, another one does not."""

import pytest
import torch
from PIL import Image

from vgen.data.dataset import open_images
from vgen.data.tokens import write_tokens
from vgen.eval.captions import CaptionTask, ordered_loss
from vgen.layers.pixels import to_images
from vgen.pipelines.results import Stats, VisualOutput
from vgen.samplers.orders import make_order


@pytest.fixture
def task(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("heldout", 3)):
        folder = tmp_path / "pictures" / split
        folder.mkdir(parents=True)
        for i in range(count):
            levels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(levels.numpy()).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text("red apple" if i % 2 else "a cat on a mat")
        images = open_images(tmp_path / "pictures", split, 8)
        write_tokens(
            tmp_path / f"{split}.safetensors",
            torch.arange(count)[:, None].expand(-1, 16).int(),
            captions=images.captions,
            labels=[0] * count,
            keys=images.keys,
            grid=(1, 4, 4),
            vocabulary=32,
            tokenizer="none",
        )
    return CaptionTask.draw(tmp_path / "pictures", tmp_path, 8, captions=5)


def made(task, pixels, tokens):
    return VisualOutput(images=to_images(pixels.view(len(pixels), 3, 8, 8)), tokens=tokens, stats=Stats())


def test_figures(task):
    assert len(task.prompts) == 5 and len(task.gallery) == 11 and len(task.held_out) == 3
    assert torch.equal(task.tokens[:, 0], task.picks)  # picture i has the tokens i
    perfect = task.figures(made(task, task.gallery[task.picks], task.tokens))
    assert (
        perfect["retrieval"] == 1 and perfect["own_tokens"] == 1 and perfect["psnr"] == pytest.approx(60, abs=0.5)
    )  # 60 is the most
    wrong = task.figures(made(task, task.gallery[(task.picks + 1) % 8], task.tokens + 1))
    assert wrong["retrieval"] == 0 and wrong["own_tokens"] == 0 and wrong["psnr"] < 12


def test_held_out_loss_is_the_mean_over_pictures(task, pipeline):
    order = make_order("random", pipeline.model.grid, steps=4)
    found = task.held_out_loss(pipeline, ordered_loss(pipeline, order))
    terms = []
    for i in range(3):
        item = task.held_out[i]
        condition = pipeline.model.vocabulary.captions([item["caption"]], 8)
        ids = order.step_ids(torch.Generator().manual_seed(i))[None]
        with torch.no_grad():
            terms.append(pipeline.model.loss(condition, item["tokens"][None], ids)["loss"])
    assert found == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
