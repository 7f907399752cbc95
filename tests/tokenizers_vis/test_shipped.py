"""The tokenizers whose weights are in the package know emoji: a picture of the shipped generator survives the way there and back."""

import pytest
import torch

from vgen.convert.load import load_tokenizer
from vgen.errors import VgenError
from vgen.eval.reconstruction import joined, reconstruct_batches
from vgen.layers.pixels import to_pixels
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.registry import SHIPPED, find_tokenizer


@pytest.fixture(scope="module")
def pixels():
    made = VisualPipeline.shipped("emoji")(["red heart", "soccer ball"], num_inference_steps=8, seed=0).images
    return torch.stack([to_pixels(image) for image in made])


@pytest.mark.parametrize("name", SHIPPED)
def test_there_and_back(name, pixels):
    (result,) = reconstruct_batches(load_tokenizer(name), pixels)
    # Far above what a grey picture or another emoji gets (about 10 dB).
    assert result.means()["psnr"] > 18


@pytest.mark.parametrize("name", SHIPPED)
def test_a_picture_comes_back_the_same_in_any_batch(name):
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(16, 3, 9, 9), (64, 64), mode="bicubic").clamp(0, 1) * 2 - 1
    tokenizer = load_tokenizer(name)

    def back(batch_size):
        return joined(list(reconstruct_batches(tokenizer, smooth, batch_size=batch_size))).reconstruction

    alone = back(1)
    for batch_size in (2, 3, 5, 16):
        assert torch.equal(back(batch_size), alone)


def test_a_name_is_as_good_as_a_folder():
    assert (find_tokenizer("emoji-kl") / "config.json").is_file()
    with pytest.raises(VgenError, match="with vgen come emoji-vq"):
        find_tokenizer("emoji-titik")


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(VgenError, match="did you mean 'emoji-titok'"):
        load_tokenizer("emoji-titik")
