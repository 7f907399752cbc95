"""The codebook that moves idle codes to features."""

from __future__ import annotations

import torch

from vgen.tokenizers_vis.latents.online_clustering import OnlineClusteringQuantizer


def quantizer(codes: int = 16, **options) -> OnlineClusteringQuantizer:
    torch.manual_seed(0)
    return OnlineClusteringQuantizer(codes, 2, window=64, **options).train()


def features() -> torch.Tensor:
    """Two far clusters, [2, 2, 1, 32]."""
    generator = torch.Generator().manual_seed(1)
    centre = torch.tensor([[10.0, 0.0], [0.0, -10.0]])
    return (centre[:, None] + torch.randn(2, 32, 2, generator=generator)).movedim(-1, 1)[:, :, None]


def test_idle_codes_jump_to_features_and_busy_codes_stay():
    q, z = quantizer(), features()
    first = q.forward(z).indices
    rows = z.movedim(1, -1).reshape(-1, 2)
    distance = torch.cdist(q.embedding.weight.detach(), rows).min(dim=1).values
    idle = torch.ones(16, dtype=torch.bool).index_fill_(0, first.flatten(), False)
    assert idle.sum() >= 8 and distance[idle].max() < 0.05 and distance[~idle].max() > 1
    assert q.forward(z).indices.unique().numel() > first.unique().numel()
    q.embed_prob.fill_(1 / 16)  # every code as busy as can be
    before = q.embedding.weight.detach().clone()
    q.forward(z)
    torch.testing.assert_close(q.embedding.weight.detach(), before)


def test_nothing_moves_in_evaluation_or_under_a_frozen_codebook():
    q, z = quantizer(), features()
    before = {name: value.clone() for name, value in q.state_dict().items() if name != "codebook_used"}
    q.eval().forward(z)
    q.train().embedding.weight.requires_grad_(False)
    q.forward(z)
    assert all(torch.equal(q.state_dict()[name], value) for name, value in before.items())


def test_the_shares_count_tokens_with_decay():
    q = quantizer(4)
    q.embedding.weight.data.copy_(torch.tensor([[10.0, 0.0], [0.0, -10.0], [50.0, 50.0], [-50.0, 50.0]]))
    q.forward(features())
    torch.testing.assert_close(q.embed_prob, torch.tensor([0.005, 0.005, 0.0, 0.0]))


def test_gradients_survive_the_overwriting():
    q, z = quantizer(normalise=True), features().requires_grad_()
    found = q(z)
    (found.quantized.square().sum() + found.vq + found.commit).backward()
    assert z.grad.isfinite().all() and q.embedding.weight.grad.abs().sum() > 0
