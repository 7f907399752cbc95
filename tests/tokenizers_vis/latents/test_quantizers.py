"""The vector quantizer: values, gradients, usage, collapse, restarts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.tokenizers_vis.latents.quantizers import VectorQuantizer


@settings(max_examples=20, deadline=None)
@given(codes=st.integers(2, 40), channels=st.integers(1, 9), size=st.integers(1, 5), normalise=st.booleans())
def test_the_nearest_code_is_returned(codes: int, channels: int, size: int, normalise: bool):
    torch.manual_seed(codes * 100 + channels)
    quantizer = VectorQuantizer(codes, channels, normalise, window=16).eval()
    quantizer.embedding.weight.data.normal_()
    z = torch.randn(2, channels, size, size + 1)
    found = quantizer(z)
    rows = z.movedim(1, -1).reshape(-1, channels)
    rows = F.normalize(rows, dim=-1) if normalise else rows
    distances = torch.cdist(rows.double(), quantizer.codebook().double())
    chosen = distances.gather(1, found.indices.view(-1, 1)).squeeze(1)
    torch.testing.assert_close(chosen, distances.min(dim=1).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found.quantized.movedim(1, -1).reshape(-1, channels), quantizer.lookup(found.indices.view(-1))
    )
    assert found.vq is None and found.usage is None


def test_gradients_of_the_two_losses_go_their_own_ways():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 3, window=64).train()
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    found = quantizer(z)
    found.vq.backward(retain_graph=True)
    assert z.grad is None and quantizer.embedding.weight.grad.abs().sum() > 0
    quantizer.embedding.weight.grad = None
    found.commit.backward()
    assert z.grad.abs().sum() > 0 and quantizer.embedding.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_codes(dtype: torch.dtype):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4096, 8, window=16).eval()
    z = torch.randn(1, 8, 16, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z)
    assert torch.equal(inside.indices, quantizer(z.float()).indices)
    assert inside.quantized.dtype == torch.float32


def test_the_entropy_loss_is_lowest_for_sure_and_even_choices():
    quantizer = VectorQuantizer(4, 4, entropy_ratio=1.0, window=16)
    quantizer.embedding.weight.data = torch.eye(4)
    even = quantizer._entropy(torch.eye(4).repeat(3, 1))
    single = quantizer._entropy(torch.eye(4)[:1].repeat(12, 1))
    assert even.item() == pytest.approx(-math.log(4), abs=1e-3) and single.item() == pytest.approx(0.0, abs=1e-3)


def test_the_queue_keeps_the_newest_indices():
    quantizer = VectorQuantizer(16, 2, window=6)
    quantizer._remember(torch.tensor([1, 2, 3, 4]))
    assert quantizer.codebook_used.tolist() == [0, 0, 1, 2, 3, 4]
    assert quantizer.statistics().seen == 4 and quantizer.statistics().used == 4
    quantizer._remember(torch.arange(8))
    assert quantizer.codebook_used.tolist() == [2, 3, 4, 5, 6, 7]
    assert quantizer.statistics().perplexity == pytest.approx(6)
    again = VectorQuantizer(16, 2, window=6)
    again.load_state_dict(quantizer.state_dict())
    assert again.statistics() == quantizer.statistics()


def test_collapse_is_said_and_healthy_use_is_not():
    quantizer = VectorQuantizer(256, 2, window=1024)
    assert quantizer.collapsed() is None and quantizer.statistics().seen == 0
    quantizer._remember(torch.randint(256, (1024,), generator=torch.Generator().manual_seed(0)))
    assert quantizer.collapsed() is None
    for code in (0, 7):
        quantizer._remember(torch.full((1024,), code))
        assert "collapsed: 1 of 256 codes" in quantizer.collapsed()


def test_dead_codes_restart_from_encoder_outputs_reproducibly():
    def restarted() -> VectorQuantizer:
        torch.manual_seed(0)
        quantizer = VectorQuantizer(8, 3, window=32)
        quantizer._remember(torch.tensor([1, 1, 5, 5] * 4))
        assert quantizer.restart_dead_codes(rows, torch.Generator().manual_seed(3), recent=16) == 6
        return quantizer

    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    fresh = VectorQuantizer(8, 3, window=32).embedding.weight.detach()
    weight = restarted().embedding.weight.detach()
    assert torch.equal(weight[[1, 5]], fresh[[1, 5]])
    distance = torch.cdist(weight[[0, 2, 3, 4, 6, 7]], F.normalize(rows, dim=-1)).min(dim=1).values
    assert distance.max() < 1e-3
    assert torch.equal(weight, restarted().embedding.weight)


def test_a_restart_revives_a_collapsed_codebook():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, window=512).train()
    quantizer.embedding.weight.data.copy_(torch.tensor([1.0, 0, 0, 0]) + 1e-4 * torch.randn(64, 4))
    quantizer.embedding.weight.data[0] = torch.tensor([-1.0, 0, 0, 0])
    z = torch.randn(2, 4, 16, 16)
    before = quantizer(z).indices.unique().numel()
    quantizer.restart_dead_codes(z.movedim(1, -1).reshape(-1, 4), torch.Generator().manual_seed(0))
    assert quantizer(z).indices.unique().numel() > before + 20


def test_without_a_queue_there_is_no_bookkeeping():
    quantizer = VectorQuantizer(8, 3, window=0).train()
    found = quantizer(torch.randn(1, 3, 2, 2))
    assert set(quantizer.state_dict()) == {"embedding.weight"} and found.usage is None
    assert quantizer.statistics().seen == 0 and quantizer.collapsed() is None


@pytest.mark.parametrize("normalise", [False, True])
def test_sure_weights_look_up_their_code(normalise: bool):
    quantizer = VectorQuantizer(8, 3, normalise, window=0)
    quantizer.embedding.weight.data.normal_()
    torch.testing.assert_close(quantizer.soft_lookup(torch.eye(8)), quantizer.codebook())
    mixed = quantizer.soft_lookup(torch.full((8,), 1 / 8))
    mean = quantizer.embedding.weight.mean(dim=0)
    torch.testing.assert_close(mixed, F.normalize(mean, dim=0) if normalise else mean)


def test_the_entropy_loss_is_its_formula():
    """E[H(p)] - H(E[p]) of p = softmax(-|row - code|^2 / 0.01): MAGVIT-v2, arXiv 2310.05737, equation 4."""
    quantizer = VectorQuantizer(6, 3, entropy_ratio=0.1, window=16).train()
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 3, 4, 4)
    rows = F.normalize(z.movedim(1, -1).reshape(-1, 3), dim=-1).double()
    distance = (rows[:, None] - quantizer.codebook().double()).square().sum(dim=-1)
    p = (-distance / 0.01).softmax(dim=-1)
    of_rows = -torch.special.xlogy(p, p).sum(dim=-1).mean()
    of_mean = -torch.special.xlogy(p.mean(dim=0), p.mean(dim=0)).sum()
    assert quantizer(z).entropy.item() == pytest.approx(0.1 * (of_rows - of_mean).item(), rel=1e-3)
