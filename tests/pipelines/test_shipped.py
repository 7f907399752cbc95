"""The model that ships with the package: it is there, small enough, and makes what it is asked for, in any order."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from vgen.cli.main import main
from vgen.cli.sample import PROMPTS
from vgen.errors import VgenError
from vgen.pipelines.components import SHIPPED
from vgen.pipelines.visual import VisualPipeline


@pytest.fixture(scope="module")
def pipe():
    return VisualPipeline.shipped("emoji")


def colour(image, left, top, right, bottom):
    """Mean RGB of a box given in shares of the side."""
    array = np.asarray(image, dtype=float)
    rows, columns = (slice(int(a * 64), int(b * 64)) for a, b in ((top, bottom), (left, right)))
    return array[rows, columns].reshape(-1, 3).mean(axis=0)


def test_weights_stay_within_their_limits():
    """25 MB for pipelines, 15 MB more for the tokenizers."""
    folder = Path(str(resources.files("vgen.assets")))
    size = {path.name: 0 for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
    for name in size:
        size[name] = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
    assert size.keys() == {*SHIPPED, "tokenizers"}
    assert size.pop("tokenizers") < 15e6
    assert sum(size.values()) < 25e6
    with pytest.raises(VgenError, match="emoji"):
        VisualPipeline.shipped("emojis")


def test_default_prompts_are_words_it_knows(pipe):
    assert len(PROMPTS) == 16
    pipe.model.vocabulary.captions(PROMPTS, pipe.model.config.prefix_limit)


@pytest.mark.parametrize("order", [None, "raster", "neighbor", "regions-4", "zip-3", "random", "confidence"])
def test_pictures_show_what_was_asked_for(pipe, order):
    heart, flag, apple = pipe(["red heart", "flag of japan", "red apple"], order=order, seed=2).images
    for image, box in ((heart, (0.4, 0.35, 0.6, 0.6)), (flag, (0.45, 0.4, 0.6, 0.6)), (apple, (0.3, 0.4, 0.7, 0.8))):
        red, green, blue = colour(image, *box)
        assert red > 130 and red > green + 60 and red > blue + 40
    assert colour(flag, 0.05, 0.25, 0.2, 0.6).min() > 190  # white beside the disc
    assert colour(heart, 0.0, 0.9, 0.15, 1.0).min() > 200  # and around the heart


def test_a_picture_is_the_same_bytes_in_any_batch(pipe):
    def pictures(batch_size):
        made = pipe(PROMPTS, batch_size=batch_size, seed=7, num_inference_steps=8)
        return made.tokens, [image.tobytes() for image in made.images]

    tokens, alone = pictures(1)
    for batch_size in (2, 3, 5, 16):
        again, together = pictures(batch_size)
        assert torch.equal(again, tokens) and together == alone


def test_inpainting_in_the_shipped_model(pipe, tmp_path):
    from PIL import Image

    base = pipe("grinning face").images[0]
    mask = Image.new("L", base.size)
    mask.paste(255, (0, 32, 64, 64))
    result = pipe("red heart", num_images_per_prompt=2, init_image=base, mask=mask)
    kept = pipe.tokenizer.encode(torch.from_numpy(np.asarray(base).copy()).permute(2, 0, 1)[None] / 127.5 - 1)
    assert torch.equal(result.tokens[:, :32], kept[:, :32].expand(2, -1))


def test_the_first_command_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample"]) == 0
    assert (tmp_path / "outputs" / "samples.png").is_file()
    assert "16 pictures" in capsys.readouterr().out
