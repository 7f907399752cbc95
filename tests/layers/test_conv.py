"""The shared convolutional encoder and decoder."""

from __future__ import annotations

import pytest
import torch

from vgen.layers.conv import AttnBlock, Decoder, Downsample, Encoder


def test_shapes_with_different_multipliers_and_non_square_inputs():
    encoder = Encoder(3, 8, (1, 2, 3), 1, 5, groups=4)
    decoder = Decoder(5, 8, (2, 1, 1), 1, 3, groups=4)
    features = encoder(torch.randn(2, 3, 16, 24))
    assert features.shape == (2, 5, 4, 6)
    assert decoder(features).shape == (2, 3, 16, 24)


@pytest.mark.parametrize("half", [Encoder, Decoder])
def test_attention_goes_where_it_is_asked_for(half):
    net = half(3, 8, (1, 1, 1), 2, 3, attention_levels=(0, -1), middle_attention=False, groups=4)
    blocks = 2 if half is Encoder else 3
    assert [len(level.attn) for level in net.conv_blocks] == [blocks, 0, blocks]
    assert not any(name.startswith("mid.1") for name in net.state_dict())
    assert "mid.2.conv1.weight" in net.state_dict()


def test_downsampling_pads_at_the_right_and_bottom_only():
    layer = Downsample(1)
    torch.nn.init.zeros_(layer.conv.bias)
    torch.nn.init.zeros_(layer.conv.weight)
    layer.conv.weight.data[0, 0, 0, 0] = 1.0  # picks the top left pixel of each window
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [0, 2, 8, 10]


def test_attention_is_softmax_attention_over_positions():
    torch.manual_seed(0)
    block = AttnBlock(8, groups=2)
    x = torch.randn(2, 8, 3, 5)
    h = block.norm(x)
    q, k, v = (part(h).flatten(2) for part in (block.q, block.k, block.v))
    weights = (q.mT @ k * 8**-0.5).softmax(dim=-1)
    expected = x + block.proj_out((v @ weights.mT).view_as(x))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=0)


def test_channels_last_is_kept_in_bf16():
    net = Encoder(3, 8, (1, 2), 1, 4, groups=4).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.float(), net(x), atol=0.1, rtol=0)
