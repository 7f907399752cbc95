"""What a tokenizer of any family says to pictures and tokens of another kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.tokenizers_vis.registry import find_tokenizer, open_tokenizer

SHIPPED = ("emoji-kl", "emoji-titok")
PICTURE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(params=["plain", *SHIPPED])
def tokenizer(request, pipeline):
    return pipeline.tokenizer if request.param == "plain" else open_tokenizer(find_tokenizer(request.param))


def test_pixels_of_another_kind_are_one_sentence(tokenizer):
    for pixels, words in (
        (PICTURE.to(torch.uint8), r"uint8; levels from 0 to 255 become pixels by x / 127.5 - 1"),
        (PICTURE.long(), "int64"),
        (PICTURE + 255, "found 255 to 255"),
        (PICTURE * float("nan"), "found nan"),
        (PICTURE.numpy(), "got a ndarray of shape"),
        (Image.new("RGB", (64, 64)), "to_pixels makes them"),
        ([[0.0]], "got "),
        (PICTURE[0], r"the shape \[3, 64, 64\]"),
        (PICTURE.permute(0, 2, 3, 1), r"the shape \[1, 64, 64, 3\]"),
        (PICTURE[:0], r"the shape \[0, 3, 64, 64\]"),
    ):
        with pytest.raises(VgenError, match=words):
            tokenizer.encode(pixels)


def test_pixels_in_any_precision_are_pixels(tokenizer):
    torch.manual_seed(0)
    pixels = torch.rand_like(PICTURE).mul(255).round() / 127.5 - 1
    tokens = tokenizer.encode(pixels)
    torch.testing.assert_close(tokenizer.encode(pixels.double()), tokens)
    assert tokenizer.encode(pixels.bfloat16()).shape == tokens.shape


def test_tokens_of_another_kind_are_one_sentence(tokenizer):
    tokens = tokenizer.encode(PICTURE)
    other = tokens.float() if not tokens.is_floating_point() else tokens.long()
    for wrong in (other, tokens[0], np.asarray(tokens.detach()), tokens.tolist()):
        with pytest.raises(VgenError, match=r"codes are an int64 tensor|latents of this tokenizer are floats"):
            tokenizer.decode(wrong)
