"""The joint block equals diffusers' own (an independent implementation with the same parameter names)."""

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock

from vgen.layers.joint import JointBlock, ScaleShiftNorm
from vgen.layers.sinusoid import cos_sin, interleaved, sin_cos


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_it_is_the_block_of_stable_diffusion_3(last):
    torch.manual_seed(0)
    theirs = JointTransformerBlock(24, 3, 8, context_pre_only=last).eval()
    ours = JointBlock(24, 3, last)
    ours.load_state_dict(theirs.state_dict())
    x, text, condition = torch.randn(2, 5, 24), torch.randn(2, 4, 24), torch.randn(2, 24)
    expected_text, expected = theirs(hidden_states=x, encoder_hidden_states=text, temb=condition)
    found, found_text = ours(x, text, condition)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found_text, text) if last else torch.allclose(found_text, expected_text, atol=1e-5)


@torch.no_grad()
def test_the_last_norm_reads_scale_before_shift():
    norm = ScaleShiftNorm(4)
    norm.linear.weight.zero_()
    norm.linear.bias.copy_(torch.tensor([1.0] * 4 + [5.0] * 4))
    out = norm(torch.randn(1, 3, 4), torch.zeros(1, 4))
    torch.testing.assert_close(out.mean(dim=-1), torch.full((1, 3), 5.0))
    assert (out.std(dim=-1, correction=0) - 2).abs().max() < 1e-3


def test_sinusoids_differ_by_their_layout_only():
    values = torch.tensor([0.0, 3.0, 650.0])
    first, second, third = (layout(values, 6) for layout in (cos_sin, sin_cos, interleaved))
    assert torch.equal(first[:, :3], second[:, 3:]) and torch.equal(first[:, 3:], second[:, :3])
    assert torch.equal(third[:, 0::2], second[:, :3]) and torch.equal(third[:, 1::2], second[:, 3:])
    assert cos_sin(values, 7).shape == (3, 7) and (sin_cos(values, 7)[:, -1] == 0).all()
    assert not torch.equal(sin_cos(values, 6, period=1000.0), second)
