"""Shared by all tests: tiny pictures, a tiny tokenizer, and a tiny pipeline that fits together; all take milliseconds."""

import random

import numpy as np
import pytest
import torch
from PIL import Image


def pytest_runtest_setup(item):
    """Every test draws the same numbers in every run, alone or among others: none may depend on luck or on its neighbours."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def assert_same_weights(one, other):
    """Equal names, shapes and values. Outputs of a loaded model may differ in the last bit: its tensors lie elsewhere in memory,
    at another alignment, and matrix products sum in another order."""
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(state[key], value)] == []


def tiny_pipeline():
    """8x8-pixel pictures of 4x4 tokens, random weights."""
    from vgen.models.anyorder import AnyOrderModel
    from vgen.models.conditions.vocabulary import Vocabulary
    from vgen.pipelines.visual import VisualPipeline
    from vgen.tokenizers_vis.vq import VQModel

    torch.manual_seed(0)
    tokenizer = VQModel(
        ch=16,
        encoder_ch_mult=(1, 1),
        decoder_ch_mult=(1, 1),
        num_res_blocks=1,
        z_channels=16,
        codebook_size=32,
        codebook_embed_dim=4,
        usage_window=64,
        num_groups=4,
    )
    vocabulary = Vocabulary.build(["red apple", "a cat on a mat"], classes=3)
    model = AnyOrderModel(
        len(vocabulary), 32, (1, 4, 4), width=64, content_layers=1, query_layers=1, heads=2, prefix_limit=8
    )
    torch.nn.init.normal_(model.head.weight, std=0.3)
    model.vocabulary = vocabulary
    return VisualPipeline(tokenizer.eval(), model.eval(), order="random", steps=5, guidance_scale=2.0)


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder with train/ (two classes, 6 pictures each) and heldout/ (3 each): squares of one colour on white, 32 px, captioned."""
    folder = tmp_path / "pictures"
    colours = {"red": (200, 30, 30), "blue": (30, 30, 200)}
    for split, count in (("train", 6), ("heldout", 3)):
        for name, colour in colours.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (32, 32), "white")
                image.paste(colour, (2 + number, 3, 20 + number, 18 + 2 * number))
                image.save(folder / split / name / f"{number}.png")
                (folder / split / name / f"{number}.txt").write_text(f"{name} square number {number}")
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    """A tiny VQ model (32 codes, 8x8 pixels a token), saved in tmp_path / "tokenizer"."""
    from vgen.tokenizers_vis.vq import VQModel

    model = VQModel.of_size(
        "emoji-f8",
        ch=8,
        encoder_ch_mult=[1],
        decoder_ch_mult=[1],
        z_channels=8,
        codebook_size=32,
        num_groups=4,
        patch_size=8,
    )
    model.save_pretrained(tmp_path / "tokenizer")
    return model.eval()
