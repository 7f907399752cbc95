"""Shared by all tests: a tiny pipeline that fits together and takes milliseconds."""

import random

import numpy as np
import pytest
import torch


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
