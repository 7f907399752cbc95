"""Coarse-to-fine strips: labels, sizes, numbers of tokens."""

import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.viz.strips import reconstruct


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return FlexTok(
        vae_family=None, encoder_width=16, encoder_depth=1, decoder_width=16, decoder_depth=1, head_dim=8,
        patch_size=8, max_grid=(2, 2), registers=4, levels=(5, 5), frequencies=8, steps=1,
    ).eval()  # fmt: skip


def test_strip_has_a_column_for_the_original_and_for_every_count(tokenizer):
    pictures = [Image.new("RGB", (40, 24), "red"), Image.new("RGBA", (16, 16))]
    whole = reconstruct(tokenizer, pictures)
    assert whole.width == (1 + 3) * (16 + 8) + 8  # original, 1, 2 and 4 tokens, 16 px each with gaps of 8
    assert whole.height > reconstruct(tokenizer, pictures[0]).height
    assert reconstruct(tokenizer, pictures[0], [1, 3], scale=2).width == 3 * (32 + 8) + 8
    assert whole.getpixel((8 + 4, 8 + 4)) == (255, 0, 0)


def test_counts_out_of_range(tokenizer):
    with pytest.raises(VgenError, match=r"num_tokens must lie in 1\.\.4"):
        reconstruct(tokenizer, Image.new("RGB", (16, 16)), [5])
