"""Fréchet distances of Gaussians with a known one."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.eval.frechet import frechet_distance, pair_rows, token_rows


def test_known_distances():
    rows = torch.randn(40000, 3, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(rows, rows + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5, abs=1e-6)
    # Diagonal covariances commute: the sum of (s1 - s2)².
    scaled = rows * torch.tensor([2.0, 1.0, 0.5])
    assert frechet_distance(rows, scaled) == pytest.approx(1 + 0 + 0.25, abs=0.02)
    assert frechet_distance(scaled, rows) == pytest.approx(frechet_distance(rows, scaled), abs=1e-9)


def test_pairs_tell_tokens_that_do_not_fit_together():
    draws = torch.Generator().manual_seed(0)
    smooth = torch.randn(500, 1, 2, generator=draws).expand(500, 16, 2) + 0.1 * torch.randn(500, 16, 2, generator=draws)
    shuffled = smooth.flatten(0, 1)[torch.randperm(8000, generator=draws)].view(500, 16, 2)
    grid = (1, 4, 4)
    assert frechet_distance(token_rows(smooth), token_rows(shuffled)) < 1e-9
    assert pair_rows(smooth, grid).shape == (500 * 12, 4)
    assert torch.equal(pair_rows(smooth, grid)[0], torch.cat((smooth[0, 0], smooth[0, 1])))
    assert frechet_distance(pair_rows(smooth, grid), pair_rows(shuffled, grid)) > 0.5


def test_too_few_vectors():
    with pytest.raises(VgenError, match="more vectors than that"):
        frechet_distance(torch.randn(3, 3), torch.randn(9, 3))
