"""vq_nearest against the distance matrix that it avoids."""

from __future__ import annotations

import pytest
import torch

from vgen.errors import VgenError
from vgen.kernels.vq_nearest import vq_nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_code_is_nearer(impl, dtype, device):
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(70, 12, generator=rng).to(device, dtype)
    codebook = torch.randn(260, 12, generator=rng).to(device, dtype)
    index = vq_nearest(rows, codebook, impl=impl)
    distance = (rows.double()[:, None] - codebook.double()).square().sum(-1)
    chosen = distance.gather(1, index[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(1), rtol=0, atol=1e-5)
    first, second = distance.topk(2, dim=1, largest=False).values.unbind(dim=1)
    clear = second - first > 1e-4  # rounding may decide between nearer ones
    assert clear.sum() >= 68 and torch.equal(index[clear], distance.argmin(1)[clear])


def test_the_first_of_equal_codes(impl, device):
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], device=device).repeat(60, 1)
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0], [9.0, 8.0], [0.5, 0.5]], device=device)
    assert vq_nearest(rows, codebook, impl=impl).tolist() == [1, 2, 0, 1]


def test_rows_beyond_one_chunk(monkeypatch):
    rng = torch.Generator().manual_seed(1)
    rows, codebook = torch.randint(-4, 5, (50, 3), generator=rng) / 2, torch.randint(-4, 5, (9, 3), generator=rng) / 2
    whole = vq_nearest(rows, codebook, impl="torch")
    monkeypatch.setattr("vgen.kernels.vq_nearest.CPU_CHUNK", 9 * 7)
    assert torch.equal(vq_nearest(rows, codebook, impl="torch"), whole)


def test_any_strides_and_no_rows(impl, device):
    rng = torch.Generator().manual_seed(2)
    rows, codebook = torch.randn(6, 40, generator=rng).to(device).T, torch.randn(6, 33, generator=rng).to(device).T
    packed = vq_nearest(rows.contiguous(), codebook.contiguous(), impl=impl)
    assert torch.equal(vq_nearest(rows, codebook, impl=impl), packed)
    assert vq_nearest(rows[:0], codebook, impl=impl).shape == (0,)


@pytest.mark.parametrize(("rows", "codebook"), [((3, 4), (5, 3)), ((3,), (5, 3)), ((3, 4), (0, 4))])
def test_errors(rows, codebook):
    with pytest.raises(VgenError, match=r"rows \[R, C\] and a codebook \[K, C\]"):
        vq_nearest(torch.zeros(rows), torch.zeros(codebook))
